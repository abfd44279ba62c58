"""A budget fitted to the pictures of a request: the server's own, or that of a client who asks for it."""

from dataclasses import replace
from math import ceil

from twigvlm.base.masks import check_mask_attention
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import PruningConfig, TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import average_kept, average_scouted, solve_keep, solve_scouted, twig_cuts
from twigvlm.pruning.cut import Pruner, schedule
from twigvlm.pruning.methods import make_pruner


def fitted(pruning: PruningConfig, visual: int, layers: int, twig: TwigConfig) -> PruningConfig:
    """Options of pruning that are possible for a prompt.

    A prompt with no more visual tokens than the budget keeps all of them. If the layers before the first cut use up most of R̄,
    at least R̄ / 2 tokens are kept.

    Args:
        pruning: as asked for.
        visual: M of the prompt.
        layers: L.
        twig: of the model.
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
        scouted = visual, layers, twig.trunk_layers
        low, high = (average_scouted(keep, *scouted) for keep in (1, visual))
        keep = solve_scouted(min(max(budget, low), high), *scouted)
    else:
        shape = visual, layers, *twig.cut_layers(layers, pruning.final_wipe, pruning.final_share)
        low, high = (average_kept(keep, *shape) for keep in (1, visual))
        keep = solve_keep(min(max(budget, low), high), *shape)
    return replace(pruning, retain=None, keep=max(keep, least))


def check_possible(pruning: PruningConfig, base: BaseVLM, twig: TwigConfig) -> None:
    """Raise TwigVLMError where options of pruning are impossible for every prompt, such as layers that the base does not have."""
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
    """The smallest budget, from R̄ up, of which the first cut of another method keeps enough."""

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
