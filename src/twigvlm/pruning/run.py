"""Layers between cuts: the one way in which visual tokens are dropped, in a prefill and in the rewards of stage 2."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxtyping import Bool
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.prompt import Prompt
from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import CacheView
from twigvlm.pruning.cut import Choice, Cut
from twigvlm.pruning.view import Tokens

Choose = Callable[[Tokens, int, Sequence[int]], Bool[Tensor, "batch tokens"] | Choice]
"""(tokens at a cut, its layer, how many visual tokens each row keeps) -> the visual tokens that stay, as a mask or a `Choice`."""


def run_cuts(
    base: BaseVLM,
    tokens: Tokens,
    start: int,
    stop: int,
    cuts: Sequence[Sequence[Cut]],
    choose: Choose,
    masks: Masks,
    view: CacheView | None = None,
    prompt: Prompt | None = None,
    keep_last_input: bool = False,
) -> Tokens:
    """Layers start..stop-1 (from 0); at each cut the visual tokens that are not chosen leave (§3.3).

    Args:
        base: the base.
        tokens: before layer `start`.
        start: first layer.
        stop: layer after the last one.
        cuts: cuts of each row, at the same layers in all of them, `start` <= layer <= `stop`.
        choose: chooses the visual tokens that stay; not called at a cut that keeps none in any row.
        masks: masks of the prompt.
        view: view of the cache that stores keys and values; None: they are not stored.
        prompt: the prompts that the tokens belong to, for choices that compact positions.
        keep_last_input: whether the input of the last layer before each cut, and before `stop`, is kept in `Tokens.before`.

    Returns:
        The tokens that are left, after layer `stop`.

    Raises:
        TwigVLMError: other numbers of visual tokens were chosen than the cuts say, by which the budget is counted.
    """
    text: list[int] = []
    for at_layer in zip(*cuts, strict=True):
        layer, keep = at_layer[0].layer, [cut.keep for cut in at_layer]
        tokens = tokens.through(base, start, layer, masks, view, keep_last_input)
        start = layer
        choice = Choice(tokens.text)
        if any(keep):
            chosen = choose(tokens, layer, keep)
            choice = chosen if isinstance(chosen, Choice) else Choice(chosen)
        if not text:
            visual = tokens.visual.sum(dim=1).tolist()
            text = [length - count for length, count in zip(tokens.lengths, visual, strict=True)]
        if choice.hidden is not None:
            tokens = replace(tokens, hidden=choice.hidden)
        tokens = tokens.keep(choice.stays | tokens.text)
        kept = [length - count for length, count in zip(tokens.lengths, text, strict=True)]
        if kept != keep:
            raise TwigVLMError(
                f"pruner: kept {kept} visual tokens at its cut after layer {layer}, where its schedule has {keep}; let "
                "choose keep as many as it is asked to"
            )
        if choice.compacted:
            assert prompt is not None, "it has positions"
            tokens = tokens.compacted(base, prompt)
    return tokens.through(base, start, stop, masks, view, keep_last_input)
