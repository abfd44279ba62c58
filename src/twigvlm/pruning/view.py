"""What a pruning method can see: the tokens on their way through the layers, and the prompt after the trunk."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.packing import Lengths, last_token, left_pack, valid_mask
from twigvlm.base.prompt import Prompt
from twigvlm.base.token_inputs import TokenInputs, select_tokens, slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import CacheView
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.select import gather_tokens
from twigvlm.twig.block import Twig

_BEYOND = 2**40  # a position past every image, so that bidirectional attention cannot reach padding


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch on their way through the layers; each row is padded at its end."""

    hidden: Float[Tensor, "batch tokens width"]
    inputs: TokenInputs
    visual: Bool[Tensor, "batch tokens"]
    """True at visual tokens."""
    lengths: Lengths
    index: Int[Tensor, "batch tokens"] | None = None
    """Index of each token in the prompt; None: these are all tokens of the prompt."""
    before: Float[Tensor, "batch tokens width"] | None = None
    """States before the layer that ran last, if they were kept."""

    @property
    def last(self) -> Float[Tensor, "batch width"]:
        """States of each row's last token."""
        return last_token(self.hidden, self.lengths)

    @property
    def text(self) -> Bool[Tensor, "batch tokens"]:
        """True at text tokens."""
        return valid_mask(self.lengths, self.hidden.shape[1], self.hidden.device) & ~self.visual

    def through(
        self, base: BaseVLM, start: int, stop: int, masks: Masks, view: CacheView | None, keep_last_input: bool = False
    ) -> "Tokens":
        """The tokens after layers start..stop-1 (from 0).

        Args:
            base: the base.
            start: first layer.
            stop: layer after the last one; with `start` the tokens are returned as they are.
            masks: masks of the prompt.
            view: view of the cache that stores keys and values; None: they are not stored.
            keep_last_input: whether the input of the last layer is kept in `before`.
        """
        if stop == start:
            return self
        before, args = None, (self.hidden, start, stop, self.inputs, masks, view)
        if keep_last_input:
            before, hidden = base.run_layers_with_last_input(*args)
        else:
            hidden = base.run_layers(*args)
        if view is not None and min(self.lengths) < hidden.shape[1]:
            view.cache.set_lengths(start, stop, view.rows, self.lengths)
        return replace(self, hidden=hidden, before=before)

    def keep(self, stays: Bool[Tensor, "batch tokens"]) -> "Tokens":
        """The tokens where a mask is true, in their order and with their positions; each row is padded at its end again."""
        indices, lengths = left_pack(stays)
        inputs = select_tokens(self.inputs, indices)
        padding = ~valid_mask(lengths, indices.shape[1], indices.device)
        if inputs.positions is not None:
            inputs = inputs._replace(positions=inputs.positions.masked_fill(padding, _BEYOND))
        visual = torch.gather(self.visual, 1, indices) & ~padding
        index = indices if self.index is None else torch.gather(self.index, 1, indices)
        return Tokens(gather_tokens(self.hidden, indices), inputs, visual, lengths, index)

    def compacted(self, base: BaseVLM, prompt: Prompt) -> "Tokens":
        """With consecutive positions that end where the prompt's do.

        Rotary embeddings make attention depend on distances alone, so that counting from the end is as good as counting from
        the start, and a token of the answer has the same position in all layers, whatever was cut before it.

        Args:
            base: the base, which makes rotary embeddings.
            prompt: the prompts that the tokens belong to.

        Raises:
            TwigVLMError: positions have several axes, in which no order is consecutive.
        """
        if prompt.position_ids.ndim == 3:
            raise TwigVLMError("positions='compacted': the positions of this base have three axes; use 'kept'")
        count, device = self.hidden.shape[1], self.hidden.device
        ends = torch.tensor(prompt.lengths, device=device)[:, None] - 1
        last = prompt.position_ids.gather(1, ends)
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        positions = (last - lengths + 1 + torch.arange(count, device=device)).clamp(min=0)
        rotary = base.rotary(self.hidden, positions)
        return replace(self, inputs=self.inputs._replace(cos=rotary.cos, sin=rotary.sin))


def last_mask(lengths: Lengths, tokens: int, device: torch.device | None = None) -> Bool[Tensor, "batch tokens"]:
    """True at the last token of each row of a batch that is padded at its end.

    Args:
        lengths: tokens of each row.
        tokens: tokens of the longest row, padding included.
        device: where the mask is made.
    """
    return torch.arange(tokens, device=device) == torch.tensor(lengths, device=device)[:, None] - 1


@dataclass(frozen=True)
class TrunkOutput:
    """A prompt after layer K: what a scorer may look at."""

    base: BaseVLM
    twig: Twig
    prompt: Prompt
    tokens: Tokens
    masks: Masks
    view: CacheView
    """Rows of the cache that hold the prompt."""
    prefix: PrefixCache | None = None
    """What is known of the prompt already; its beginning is in the twig's cache."""

    @cached_property
    def scores(self) -> dict[Any, Float[Tensor, "batch tokens"]]:
        """What visual tokens have been ranked by so far, by scorers; with a prefix cache, also for other requests."""
        return {} if self.prefix is None else self.prefix.scores

    @property
    def twig_is_filled(self) -> bool:
        """Whether the twig has seen all of the prompt."""
        return self.view.held(self.twig.first_layer_idx).longest == self.tokens.hidden.shape[1]

    def fill_twig(self) -> Float[Tensor, "batch tokens width"]:
        """Run the twig on what its cache does not hold of the prompt, at the first call; returns the input of its last layer.

        Raises:
            TwigVLMError: the model has no twig.
        """
        return self._last_input

    @cached_property
    def _last_input(self) -> Float[Tensor, "batch tokens width"]:
        twig, count = self.twig, self.tokens.hidden.shape[1]
        if twig.is_stand_in:
            raise TwigVLMError(
                "pruner: ranks by a twig, but this model has none; load one with TwigVLM.from_pretrained"
            )
        known = self.view.held(twig.first_layer_idx).longest
        before = None if self.prefix is None else self.prefix.last_input
        if before is not None and known == count:
            return before[:, :count]
        hidden = self.tokens.hidden[:, known:]
        last_input = twig.fill(hidden, slice_tokens(self.tokens.inputs, known, count), self.masks, self.view)
        if min(self.tokens.lengths) < count:
            self.view.cache.set_lengths(*twig.cache_layers, self.view.rows, self.tokens.lengths)
        if before is not None:
            last_input = torch.cat((before[:, :known], last_input), dim=1)
        if self.prefix is not None:
            self.prefix.store_twig(self.view, twig, last_input)
        return last_input


Scorer = Callable[[TrunkOutput], Tensor]
"""Ranks visual tokens: scores [batch, tokens], read at visual positions only. The twig's own, or a baseline's."""


def checked_scores(scorer: Scorer, trunk: TrunkOutput) -> Float[Tensor, "batch tokens"]:
    """Scores from a scorer, checked for type and shape; whole numbers become float32.

    Args:
        scorer: ranks the visual tokens.
        trunk: the prompts after layer K.

    Raises:
        TwigVLMError: the scorer returns something other than a number for each token.
    """
    scores, shape = scorer(trunk), tuple(trunk.tokens.visual.shape)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise TwigVLMError(f"scorer: returned {got}; return a tensor with a score for each token, {shape}")
    return scores if scores.is_floating_point() else scores.float()


@dataclass(frozen=True)
class CutView:
    """A prompt at a cut, as a pruning method sees it."""

    base: BaseVLM
    prompt: Prompt
    layer: int
    """Number of layers that the tokens have passed."""
    tokens: Tokens
    """The tokens that are left."""
    trunk: TrunkOutput | None
    """The prompt after layer K; None at earlier cuts."""

    @property
    def before(self) -> Float[Tensor, "batch tokens width"]:
        """States of the tokens before the layer that ran last.

        Raises:
            TwigVLMError: the method does not name `Need.LAST_LAYER`, or no layer has run yet.
        """
        if self.tokens.before is None:
            raise TwigVLMError(
                "pruner: reads the states before a layer, which are kept for methods that need them; name Need.LAST_LAYER in "
                "its needs, and cut after a layer"
            )
        return self.tokens.before

    def remaining(self, mask: Bool[Tensor, "batch prompt_tokens"]) -> Bool[Tensor, "batch tokens"]:
        """A mask of the whole prompts at the tokens that are left; False at padding."""
        here = mask if self.tokens.index is None else mask.gather(1, self.tokens.index)
        return here & valid_mask(self.tokens.lengths, here.shape[1], here.device)
