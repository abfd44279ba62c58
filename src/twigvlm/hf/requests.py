"""From the arguments of a call to rows for an engine, through the base's own `generate`."""

from contextlib import nullcontext
from typing import Any

import torch

from twigvlm.base.vlm import BaseVLM, is_refusal
from twigvlm.config import PruningConfig
from twigvlm.engine.row import Row
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.hf.checks import check_arguments, check_memory
from twigvlm.hf.generate import HFGenerateAdapter, Schedule, with_stop_strings
from twigvlm.kv.prefix_cache import Pictures, PrefixCache
from twigvlm.pruning.cut import Need, Pruner, schedule
from twigvlm.pruning.methods import pruner_by_name
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.methods.scout import ScoutPruner
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.refocus import check_refocus
from twigvlm.pruning.select import best, best_of_each_image, diverse
from twigvlm.pruning.view import Scorer
from twigvlm.twig.block import Twig


def rows_of(
    base: BaseVLM,
    twig: Twig,
    pruning: PruningConfig,
    scorer: Scorer | None,
    pruner: Pruner | None,
    generator: torch.Generator | None,
    prefix: PrefixCache | None,
    kwargs: dict[str, Any],
    alone: bool = True,
    pictures: Pictures | None = None,
) -> HFGenerateAdapter:
    """What the base's own `generate` makes of its arguments: rows for an engine."""
    # As accelerate's hooks do: a base that lies on several devices takes inputs from wherever they are.
    kwargs = {name: one.to(base.device) if isinstance(one, torch.Tensor) else one for name, one in kwargs.items()}
    pruner, schedule = _pruning(base, twig, pruning, scorer, pruner)
    looks = pruner is not None and Need.VISION in pruner.needs
    if prefix is not None:
        pixels = base.pixels(kwargs)
        prefix.show(pictures or Pictures(kwargs))
        if not looks and not prefix.needs_vision(base, kwargs["input_ids"]):
            kwargs = {name: value for name, value in kwargs.items() if name not in pixels}
    with torch.inference_mode(), base.watch_vision() if looks else nullcontext() as vision:
        adapter = HFGenerateAdapter(
            base, pruner, schedule, pruning.refocus, kwargs.get("streamer"), generator, prefix, vision, alone
        )
        try:
            base.model.generate(custom_generate=adapter, **with_stop_strings(kwargs, base.model.generation_config))
        except Exception as error:
            if adapter.entered or not is_refusal(error):
                raise
            if isinstance(error, ValueError):
                raise TwigVLMError(one_line(error)) from error
            # Positions of images, and for some families their features, are made before the adapter is called.
            raise TwigVLMError(f"the base refuses this prompt ({one_line(error)}); check its inputs") from error
    return adapter


def request_row(
    base: BaseVLM,
    twig: Twig,
    inputs: dict[str, Any],
    *,
    retain: float | None = None,
    keep: int | None = None,
    final_wipe: int | None = None,
    final_share: float | None = None,
    retain_per_image: bool = False,
    refocus: float | None = None,
    scout: bool = False,
    diverse: bool = False,
    scorer: Scorer | None = None,
    pruner: Pruner | str | None = None,
    generator: torch.Generator | None = None,
    memory: PrefixCache | None = None,
    pictures: Pictures | None = None,
    **kwargs: Any,
) -> Row:
    """The row of one request to an engine; the options are those of `TwigVLM.generate`, and for `memory` the digests of the
    `pictures`, where they are known.

    Raises:
        TwigVLMError: an option does not apply, or there is more than one prompt or answer.
    """
    name = pruner if isinstance(pruner, str) else None
    pruning = PruningConfig(retain, keep, final_wipe, final_share, retain_per_image, refocus, name, scout, diverse)
    pruner = pruner_by_name(pruner)
    kwargs = {**inputs, **kwargs}
    for name in ("streamer", "return_dict_in_generate"):
        if kwargs.get(name):
            raise TwigVLMError(f"{name}: an engine gives tokens by its events; leave it out, or use generate")
    check_arguments(kwargs, base.model.generation_config)
    check_memory(memory)
    base.check_images(kwargs["input_ids"], kwargs)
    try:
        adapter = rows_of(base, twig, pruning, scorer, pruner, generator, memory, kwargs, False, pictures)
    except BaseException:
        if memory is not None:
            memory.forget()  # it may know pictures of a prompt that it has not seen
        raise
    if len(adapter.rows) > 1:
        raise TwigVLMError(f"{len(adapter.rows)} answers: an engine takes requests one by one; add them so")
    return adapter.rows[0]


def _pruning(
    base: BaseVLM, twig: Twig, pruning: PruningConfig, scorer: Scorer | None, pruner: Pruner | None
) -> tuple[Pruner | None, Schedule]:
    """What prunes, and its cuts for a number of visual tokens."""
    layers, retain = base.num_layers, pruning.retain
    if scorer is not None and not callable(scorer):
        raise TwigVLMError(f"scorer={scorer!r}: cannot be called; give another method than the twig's by pruner")
    if scorer is not None and not pruning.active:
        raise TwigVLMError("scorer: needs a budget; give retain or keep too")
    if pruner is not None:
        pruning.check_beside_pruner(scorer)
    elif not pruning.active:
        return None, lambda visual: ()
    elif scorer is None and twig.is_stand_in:
        raise TwigVLMError(
            "pruning: this model has no trained twig to rank visual tokens; name another method with pruner, for example "
            "'divprune', or load a twig with TwigVLM.from_pretrained"
        )
    else:
        ranking = scorer or default_scorer(twig)
        select = diverse if pruning.diverse else best_of_each_image if pruning.retain_per_image else best
        if pruning.scout:
            pruner = ScoutPruner(twig, ranking, pruning.keep, select)
        else:
            final_wipe = next((k for k in (pruning.final_wipe, twig.config.final_wipe) if k is not None), layers)
            final_share = twig.config.final_share if pruning.final_share is None else pruning.final_share
            if pruning.final_share and final_wipe == layers:
                raise TwigVLMError(
                    f"final_share={pruning.final_share:g}: needs a layer after which tokens leave; give final_wipe, less than "
                    f"{layers}, too"
                )
            pruner = TwigPruner(ranking, twig.config.trunk_layers, final_wipe, final_share, pruning.keep, select)
    if pruning.refocus is not None:
        check_refocus(pruning.refocus, pruner, base, twig)
    return pruner, lambda visual: schedule(pruner, retain, visual, layers)
