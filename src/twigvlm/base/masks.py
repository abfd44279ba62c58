"""Attention masks, and when none is needed.

Three facts of the Hugging Face attention functions shape this file. Eager attention without a mask is not causal. The
causal flag of SDPA aligns queries with the *first* keys, which is wrong as soon as a cache holds a prefix. And SDPA
of one query without a mask takes torch's grouped-query path, which on CPUs in half precision is two to seven times as
slow as the one it takes with a mask.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.kv.segments import Held

Masks = Callable[[int, Held | None], Tensor | None]
"""(new tokens, what each row of a cache holds; None: no cache) -> the mask of new tokens over those and themselves."""


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, "queries keys"]:
    """True where query i, the (keys - queries + i)-th token, may see key j."""
    row = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) <= row[:, None]


def mixed_length_mask(queries: int, held: Held) -> Bool[Tensor, "rows queries keys"]:
    """Causal mask of rows that hold different numbers of tokens: query i of a row sees its first held + i + 1 keys.

    The new tokens of a row stand right after those it holds; there are max(held) + queries keys.
    """
    device = held.lengths.device
    last = held.lengths[:, None] + torch.arange(queries, device=device)
    return torch.arange(held.longest + queries, device=device) <= last[..., None]


def additive(mask: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """0 where the mask allows, the smallest number of `dtype` where it forbids."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def for_attention(attention: str, mask: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Shaped[Tensor, "*shape"]:
    """A mask as an attention implementation takes it: additive for eager attention, boolean for the others."""
    return additive(mask, dtype) if attention == "eager" else mask


def restrict(
    mask: Tensor | None,
    attention: str,
    dtype: torch.dtype,
    queries: Int[Tensor, "#batch queries"],
    keys: Int[Tensor, "#batch known"],
    attends_until: Int[Tensor, "#batch queries"] | None,
    window: int | None,
) -> Shaped[Tensor, "batch 1 queries _"]:
    """A mask for layers with a sliding window or bidirectional image attention.

    Distances are those of the unpruned sequence: what a token sees does not depend on how many others were pruned.

    Args:
        mask: who may see whom by order in the cache; None: causal.
        attention: the base's attention implementation.
        dtype: of an additive mask.
        queries: positions of the new tokens in the unpruned sequence.
        keys: positions of all tokens, the new ones last; without a window those of the new ones suffice.
        attends_until: position of the last token that each new token sees, where that is after itself (tokens of an image).
        window: how many positions a token looks back, itself included; None: all.
    """
    check_attention(attention, windowed=True)
    if mask is None:
        mask = causal_mask(queries.shape[1], keys.shape[1], queries.device)[None, None]
    elif mask.dtype != torch.bool:
        mask = mask == 0
    query, key = queries[:, None, :, None], keys[:, None, None, :]
    if attends_until is not None:  # what lies ahead of a token comes with it
        new = key[..., -queries.shape[1] :]
        ahead = (new > query) & (new <= attends_until[:, None, :, None])
        mask = mask | F.pad(ahead, (mask.shape[-1] - ahead.shape[-1], 0), value=False)
    if window is not None:
        mask = mask & (key > query - window)
    return for_attention(attention, mask, dtype)


def check_attention(attention: str, windowed: bool = False) -> None:
    """Raise TwigVLMError if masks for this attention implementation are unknown."""
    if windowed and attention.startswith("flash_attention"):
        raise TwigVLMError(
            f"attn_implementation={attention!r}: would measure sliding windows in the pruned sequence; load the base "
            "with 'sdpa'"
        )
    if attention not in ("eager", "sdpa") and not attention.startswith("flash_attention"):
        raise TwigVLMError(
            f"attn_implementation={attention!r} is not supported: load the base with 'eager', 'sdpa' or 'flash_attention_2'"
        )


class CausalMasks:
    """Masks of passes in which every token sees all that came before it.

    Args:
        attention: the base's attention implementation (`eager`, `sdpa`, `flash_attention_*`).
        dtype: of the states.
        device: device of the states.
        single: whether a single query, which sees everything, gets a mask too.
    """

    def __init__(self, attention: str, dtype: torch.dtype, device: torch.device, single: bool = False) -> None:
        check_attention(attention)
        self.attention, self.dtype, self.device, self.single = attention, dtype, device, single

    def __call__(self, queries: int, held: Held | None) -> Tensor | None:
        """Mask [rows or 1, 1, queries, keys], bool for SDPA and additive for eager; None where the kernel needs none."""
        if held is not None and not held.equal:
            check_mask_attention(self.attention, "a batch of prompts")
            return for_attention(self.attention, mixed_length_mask(queries, held), self.dtype)[:, None]
        keys = queries if held is None else held.longest + queries
        if self.attention.startswith("flash_attention") or (queries == 1 and not self.single):
            return None
        if self.attention == "sdpa" and queries == keys:
            return None
        return for_attention(self.attention, causal_mask(queries, keys, self.device), self.dtype)[None, None]


def check_mask_attention(attention: str, what: str) -> None:
    """Raise TwigVLMError if this attention implementation cannot take a mask, which `what` needs."""
    if attention.startswith("flash_attention"):
        raise TwigVLMError(f"{what}: {attention!r} takes no mask; load the base with 'sdpa' or 'eager'")


class TreeMasks:
    """Masks of nodes of token trees, one tree a row: all that a cache held before the tree is seen by each node.

    Args:
        attention: the base's attention implementation (`eager`, `sdpa`).
        ancestors: which nodes in the cache, the new ones the last of them, the new ones see.
        dtype: of the states.

    Raises:
        TwigVLMError: the attention implementation takes no mask.
    """

    def __init__(self, attention: str, ancestors: Bool[Tensor, "rows queries nodes"], dtype: torch.dtype) -> None:
        check_mask_attention(attention, "token trees")
        self.attention, self.ancestors, self.dtype = attention, ancestors, dtype

    def __call__(self, queries: int, held: Held | None) -> Tensor:
        """Mask [rows, 1, queries, keys]; layers and rows may have held different numbers of tokens before the tree."""
        assert held is not None, "a tree follows a prompt"
        nodes = self.ancestors.shape[2]
        if held.equal:
            mask = F.pad(self.ancestors, (held.longest + queries - nodes, 0), value=True)
        else:
            keys = torch.arange(held.longest + queries, device=self.ancestors.device)
            node = keys - (held.lengths + queries - nodes)[:, None]
            which = node.clamp(0, nodes - 1)[:, None].expand(-1, queries, -1)
            inside = (node < nodes)[:, None] & self.ancestors.gather(2, which)
            mask = (node < 0)[:, None] | inside
        return for_attention(self.attention, mask, self.dtype)[:, None]
