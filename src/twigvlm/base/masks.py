"""Attention masks, and when none is needed.

Three facts of the Hugging Face attention functions shape this file. Eager attention without a mask is not causal. The
causal flag of SDPA aligns queries with the *first* keys, which is wrong as soon as a cache holds a prefix. And SDPA
of one query without a mask takes torch's grouped-query path, which on CPUs in half precision is two to seven times as
slow as the one it takes with a mask.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from twigvlm.errors import TwigVLMError

Masks = Callable[[int, int], Tensor | None]
"""(queries, keys) -> the mask of new tokens that attend to `keys` tokens, themselves the last of them."""


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, "queries keys"]:
    """True where query i, the (keys - queries + i)-th token, may see key j."""
    row = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) <= row[:, None]


def padded_causal_mask(attention_mask: Shaped[Tensor, "batch tokens"]) -> Bool[Tensor, "batch 1 tokens tokens"]:
    """Causal mask that hides padding (attention_mask 0). Each token sees itself, so that no row is empty."""
    tokens = attention_mask.shape[1]
    causal = causal_mask(tokens, tokens, attention_mask.device)
    itself = torch.eye(tokens, dtype=torch.bool, device=attention_mask.device)
    return ((causal & attention_mask.bool()[:, None, :]) | itself)[:, None]


def additive(mask: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """0 where the mask allows, the smallest number of `dtype` where it forbids."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def placed(
    mask: Tensor | None,
    attention: str,
    dtype: torch.dtype,
    queries: Int[Tensor, "#batch queries"],
    keys: Int[Tensor, "#batch keys"],
    reach: Int[Tensor, "#batch queries"] | None,
    window: int | None,
) -> Shaped[Tensor, "batch 1 queries keys"]:
    """A mask for layers whose tokens do not see all that came before them, and nothing else.

    Distances are those of the unpruned sequence: what a token sees does not depend on how many others were pruned.

    Args:
        mask: who may see whom by order in the cache; None: causal.
        attention: the base's attention implementation.
        dtype: of an additive mask.
        queries: places of the new tokens in the unpruned sequence.
        keys: places of all tokens, the new ones last.
        reach: place of the last token that each new token sees, where that is after itself (tokens of an image).
        window: how many places a token looks back, its own included; None: all.
    """
    check_attention(attention, windowed=True)
    if mask is None:
        mask = causal_mask(queries.shape[1], keys.shape[1], queries.device)[None, None]
    elif mask.dtype != torch.bool:
        mask = mask == 0
    query, key = queries[:, None, :, None], keys[:, None, None, :]
    if reach is not None:
        mask = mask | ((key > query) & (key <= reach[:, None, :, None]))
    if window is not None:
        mask = mask & (key > query - window)
    return additive(mask, dtype) if attention == "eager" else mask


def check_attention(attention: str, windowed: bool = False) -> None:
    """Raise TwigVLMError if masks for this attention implementation are unknown."""
    if windowed and attention.startswith("flash_attention"):
        raise TwigVLMError(
            f"attn_implementation={attention!r}: measures sliding windows in what is left after pruning; load the base "
            "with 'sdpa'"
        )
    if attention not in ("eager", "sdpa") and not attention.startswith("flash_attention"):
        raise TwigVLMError(
            f"attn_implementation={attention!r} is not supported: load the base with 'eager', 'sdpa' or 'flash_attention_2'"
        )


class CausalMasks:
    """Masks of one unpadded request. A step's mask is a view of one table, so that a step builds nothing.

    Args:
        attention: the base's attention implementation (`eager`, `sdpa`, `flash_attention_*`).
        rows: most tokens of one step (a longer step gets a mask of its own).
        columns: most keys of the request.
        single: whether a single query, which sees everything, gets a mask too.
    """

    def __init__(
        self,
        attention: str,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        single: bool = False,
    ) -> None:
        check_attention(attention)
        self.attention, self.dtype, self.device, self.single = attention, dtype, device, single
        # Row i of the table sees all but the last rows-1-i columns: the last n rows and the last k columns are the
        # mask of n queries over k keys, whatever n and k.
        self.table = self._finish(causal_mask(rows, max(rows, columns), device))

    def _finish(self, mask: Tensor) -> Tensor:
        return additive(mask, self.dtype) if self.attention == "eager" else mask

    def __call__(self, queries: int, keys: int) -> Tensor | None:
        """Mask [1, 1, queries, keys], bool for SDPA and additive for eager; None where the kernel needs none."""
        if self.attention.startswith("flash_attention") or (queries == 1 and not self.single):
            return None
        if self.attention == "sdpa" and queries == keys:
            return None
        rows, columns = self.table.shape
        if queries > rows or keys > columns:
            return self._finish(causal_mask(queries, keys, self.device))[None, None]
        return self.table[rows - queries :, columns - keys :][None, None]


def check_tree_attention(attention: str) -> None:
    """Raise TwigVLMError if this attention implementation cannot take the mask of a token tree."""
    if attention.startswith("flash_attention"):
        raise TwigVLMError(
            f"speculate='tree': {attention!r} takes no mask; load the base with 'sdpa' or 'eager', or use speculate='chain'"
        )


class TreeMasks:
    """Masks of nodes of a token tree: all that a cache held before the tree is seen by each of them.

    Args:
        attention: the base's attention implementation (`eager`, `sdpa`).
        ancestors: which nodes in the cache, themselves the last of them, the new ones see.
        dtype: of the states.

    Raises:
        TwigVLMError: the attention implementation takes no mask.
    """

    def __init__(self, attention: str, ancestors: Bool[Tensor, "queries nodes"], dtype: torch.dtype) -> None:
        check_tree_attention(attention)
        self.ancestors = additive(ancestors, dtype) if attention == "eager" else ancestors

    def __call__(self, queries: int, keys: int) -> Tensor:
        """Mask [1, 1, queries, keys]; `keys` differs between layers, whose caches hold prefixes of different lengths."""
        before = keys - self.ancestors.shape[1]
        seen = True if self.ancestors.dtype == torch.bool else 0.0
        return F.pad(self.ancestors, (before, 0), value=seen)[None, None]


class PaddedMasks:
    """Masks of a padded batch that is run in one pass, without a cache (training)."""

    def __init__(self, attention: str, attention_mask: Tensor, dtype: torch.dtype) -> None:
        check_attention(attention)
        mask = padded_causal_mask(attention_mask)
        self.mask: Tensor | None
        if attention.startswith("flash_attention"):
            self.mask = attention_mask  # the flash kernels of transformers unpad by the 2-D mask
        else:
            self.mask = additive(mask, dtype) if attention == "eager" else mask

    def __call__(self, queries: int, keys: int) -> Tensor | None:
        """The one mask of the batch, [batch, 1, tokens, tokens] ([batch, tokens] for flash kernels)."""
        return self.mask


def reach_of(masks: Any) -> Tensor | None:
    """Index of the last token that each token sees, by the masks that a base makes itself; None if all are causal."""
    mask = masks.get("full_attention") if isinstance(masks, dict) else None
    if mask is None:
        return None
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    index = torch.arange(allowed.shape[-1], device=allowed.device)
    reach = torch.where(allowed, index, -1).amax(dim=-1).maximum(index)
    return None if bool((reach == index).all()) else reach
