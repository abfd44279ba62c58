"""From the arguments of a call to rows for an engine, through the base's own `generate`."""

from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch

from twigvlm.base.vlm import BaseVLM
from twigvlm.config import PruningConfig
from twigvlm.engine.row import Row
from twigvlm.errors import TwigVLMError, is_refusal, one_line
from twigvlm.hf.checks import check_arguments, check_memory, check_watched_layer, is_of_prompt
from twigvlm.hf.generate import HFGenerateAdapter, with_stop_strings
from twigvlm.kv.prefix_cache import Pictures, PrefixCache
from twigvlm.pruning.build import build_pruner
from twigvlm.pruning.cut import Cut, Need, Pruner, schedule
from twigvlm.pruning.refocus import check_refocus
from twigvlm.pruning.view import Scorer
from twigvlm.twig.block import Twig


def rows_of(
    base: BaseVLM,
    twig: Twig,
    pruning: PruningConfig,
    scorer: Scorer | None,
    pruner: Pruner | str | None,
    generator: torch.Generator | None,
    prefix: PrefixCache | None,
    kwargs: dict[str, Any],
    alone: bool = True,
    pictures: Pictures | None = None,
) -> HFGenerateAdapter:
    """What the base's own `generate` makes of its arguments: rows for an engine.

    Args:
        base: the base.
        twig: its twig.
        pruning: how to prune.
        scorer: ranks visual tokens in place of the twig; None: the twig does.
        pruner: pruning method, or its name; None: what `pruning` says.
        generator: for sampling; None: torch's own.
        prefix: knows earlier turns, and learns this one; None: nothing is remembered.
        kwargs: arguments of the base's `generate`.
        alone: whether the rows are decoded by themselves; False: they join others in an engine.
        pictures: those of the prompt, where their digests are known; None: they are made of `kwargs`.

    Raises:
        TwigVLMError: an option does not apply, or the base refuses the prompt or an argument.
    """
    # As accelerate's hooks do: a base that lies on several devices takes inputs from wherever they are.
    kwargs = {
        name: value.to(base.device) if isinstance(value, torch.Tensor) else value
        for name, value in kwargs.items()
        if not (value is None and is_of_prompt(name))  # transformers 5.23 runs the vision tower on pixel_values=None
    }
    chosen = build_pruner(pruning, twig, base.num_layers, scorer, pruner)
    if pruning.refocus is not None:
        check_refocus(pruning.refocus, chosen, base, twig)

    def cuts(visual: int) -> tuple[Cut, ...]:
        return () if chosen is None else schedule(chosen, pruning.retain, visual, base.num_layers)

    looks = chosen is not None and Need.VISION in chosen.needs
    if looks:
        check_watched_layer(kwargs, base.model.config)
    if prefix is not None:
        pixels = base.pixels(kwargs)
        prefix.show(pictures or Pictures(kwargs))
        if not prefix.needs_vision(base, kwargs["input_ids"], looks):
            kwargs = {name: value for name, value in kwargs.items() if name not in pixels}
    with torch.inference_mode(), base.watch_vision() if looks else nullcontext() as vision:
        adapter = HFGenerateAdapter(
            base, chosen, cuts, pruning.refocus, kwargs.get("streamer"), generator, prefix, vision, alone
        )
        try:
            base.model.generate(custom_generate=adapter, **with_stop_strings(kwargs, base.model.generation_config))
        except Exception as error:
            # Hugging Face's `generate` takes arguments of any kind, and fails where it computes with them. For some families it
            # also makes the positions of images, and their features, before it calls the adapter.
            if adapter.entered or not (is_refusal(error) or isinstance(error, TypeError | AttributeError)):
                raise
            raise TwigVLMError(f"the base refuses this call ({one_line(error)}); check its arguments") from error
    return adapter


def request_row(
    base: BaseVLM,
    twig: Twig,
    inputs: dict[str, Any],
    *,
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
    options = {option.name: kwargs.pop(option.name) for option in fields(PruningConfig) if option.name in kwargs}
    pruning = PruningConfig(**options, pruner=pruner if isinstance(pruner, str) else None)
    kwargs = {**inputs, **kwargs}
    for name in ("streamer", "return_dict_in_generate"):
        if kwargs.get(name):
            raise TwigVLMError(f"{name}: an engine gives tokens by its events; leave it out, or use generate")
    check_arguments(kwargs, base.model.generation_config)
    check_memory(memory, kwargs)
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
