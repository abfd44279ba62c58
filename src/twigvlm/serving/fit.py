"""Fit a pruning budget to the pictures of a request: the server's budget, or the client's if it sets `fit_budget`."""

from dataclasses import replace
from math import ceil

from twigvlm.base.masks import check_mask_attention
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import PruningConfig, TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import average_kept, fit_scouted, solve_keep, twig_cuts
from twigvlm.pruning.cut import Pruner, schedule
from twigvlm.pruning.methods import make_pruner


def fitted(pruning: PruningConfig, visual: int, layers: int, twig: TwigConfig) -> PruningConfig:
    """Pruning options that are possible for a prompt.

    A prompt with no more visual tokens than the budget keeps all of them. If the layers before the first cut use up most of R̄,
    at least R̄ / 2 tokens are kept.

    Args:
        pruning: the options as they were asked for.
        visual: M, number of visual tokens of the prompt.
        layers: L, number of layers of the base.
        twig: shape of the model's twig.
    """
    budget = pruning.keep if pruning.retain is None else pruning.retain
    if not visual or budget is None:
        return pruning
    if visual <= budget:
        return PruningConfig()
    if pruning.retain is None:
        return pruning
    least = ceil(pruning.retain / 2)
    if pruning.pruner not in (None, "twig"):
        return _of_another(pruning, make_pruner(pruning.pruner), visual, layers, least)
    if pruning.scout:
        return replace(pruning, retain=None, keep=fit_scouted(pruning.retain, visual, layers, twig.trunk_layers))
    shape = visual, layers, *twig.cut_layers(layers, pruning.final_wipe, pruning.final_share)
    low, high = (average_kept(keep, *shape) for keep in (1, visual))
    keep = solve_keep(min(max(budget, low), high), *shape)
    return replace(pruning, retain=None, keep=max(keep, least))


def check_possible(pruning: PruningConfig, base: BaseVLM, twig: TwigConfig) -> None:
    """Raise TwigVLMError if pruning options are impossible for every prompt, for example a layer that the base does not have."""
    if not pruning.active:
        return
    layers = base.num_layers
    if pruning.pruner not in (None, "twig"):
        # All tokens are kept, so that the budget is no reason to fail.
        make_pruner(pruning.pruner).cuts(float(layers), layers, layers)
    elif not pruning.scout:
        twig_cuts(1, 1, layers, *twig.cut_layers(layers, pruning.final_wipe, pruning.final_share))
    if pruning.refocus is not None:
        check_mask_attention(base.attention, f"refocus={pruning.refocus:g}")


def _of_another(pruning: PruningConfig, pruner: Pruner, visual: int, layers: int, least: int) -> PruningConfig:
    """The options with the smallest budget, at least R̄, under which the first cut of a method keeps `least` tokens."""

    def enough(retain: float) -> bool:
        try:
            cuts = schedule(pruner, retain, visual, layers)
        except TwigVLMError:
            return False
        return not cuts or cuts[0].keep >= least

    low, high = float(pruning.retain or 0), float(visual)
    if enough(low) or not enough(high):  # a base that the method is not for is refused as elsewhere
        return pruning
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return replace(pruning, retain=high)
