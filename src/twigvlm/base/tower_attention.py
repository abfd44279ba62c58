"""Rows of the self-attention of a block of a vision tower, computed from its input; no map of all patches is made."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twigvlm.base.capture import Call
from twigvlm.base.token_inputs import rotate

_CHUNK = 32  # queries whose attention is computed at a time


@dataclass(frozen=True)
class TowerAttention:
    """The self-attention of one block of the tower: what is needed of it is computed from its input, row by row."""

    calls: tuple[Call, ...]
    """One for images and one for videos, where a prompt has both."""

    def cls_row(self, over: str = "mean") -> Float[Tensor, " patches"]:
        """Attention of the CLS token to every patch; softmax over all tokens, mean or sum over heads."""
        rows = []
        for call in self.calls:
            queries, keys = _project(call)
            logits = (queries[:, :, :1] @ keys.transpose(-1, -2)).float() * _scaling(call.module)
            row = logits.softmax(dim=-1)[:, :, 0, 1:]
            rows.append((row.mean(dim=1) if over == "mean" else row.sum(dim=1)).flatten())
        return torch.cat(rows)

    def received(self) -> Float[Tensor, " patches"]:
        """Attention that every patch gets from all patches of its image; mean over queries and heads."""
        rows = []
        for call in self.calls:
            queries, keys = _project(call)
            got = torch.zeros(keys.shape[0], keys.shape[2], device=keys.device)
            for start, stop in _spans(call, keys.shape[2]):
                seen = keys[:, :, start:stop].transpose(-1, -2)
                for part in queries[:, :, start:stop].split(_CHUNK, dim=2):
                    shares = ((part @ seen).float() * _scaling(call.module)).softmax(dim=-1)
                    got[:, start:stop] += shares.mean(dim=1).sum(dim=1) / (stop - start)
            rows.append(got.flatten())
        return torch.cat(rows)

    def keys(self) -> Float[Tensor, "tokens heads head_dim"]:
        """Keys of all tokens, before any rotation; a CLS token comes first in its image."""
        found = (_project(call, rotated=False)[1].transpose(1, 2) for call in self.calls)
        return torch.cat([keys.flatten(0, 1) for keys in found])

    def queries(self) -> Float[Tensor, "images heads head_dim"]:
        """Queries of the CLS tokens."""
        return torch.cat([_project(call)[0][:, :, 0] for call in self.calls])

    @property
    def tokens(self) -> tuple[int, int]:
        """Images, and tokens of all of them."""
        shapes = [cast(Tensor, call.states).shape[:-1] for call in self.calls]
        return sum(shape[0] if len(shape) == 2 else 1 for shape in shapes), sum(shape.numel() for shape in shapes)

    def image_of(self) -> Int[Tensor, " tokens"]:
        """Which image each of the tower's tokens belongs to, the CLS tokens included."""
        sizes = []
        for call in self.calls:
            shape = cast(Tensor, call.states).shape[:-1]
            spans = [stop - start for start, stop in _spans(call, shape[-1])]
            sizes += spans * (shape[0] if len(shape) == 2 else 1)
        device = cast(Tensor, self.calls[0].states).device
        return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


def _project(call: Call, rotated: bool = True) -> tuple[Tensor, Tensor]:
    """Queries and keys [images, heads, tokens, head_dim] of an attention, from its input."""
    module: Any = call.module
    states = cast(Tensor, call.states)
    states = states if states.ndim == 3 else states[None]
    heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
    if hasattr(module, "qkv"):
        queries, keys, _ = module.qkv(states).unflatten(-1, (3, heads, -1)).unbind(dim=2)
    else:
        normed = (getattr(module, name, None) or (lambda part: part) for name in ("q_norm", "k_norm"))
        pairs = zip(("q_proj", "k_proj"), normed, strict=True)
        queries, keys = (norm(getattr(module, name)(states)).unflatten(-1, (heads, -1)) for name, norm in pairs)
    queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
    positions = call.kwargs.get("position_embeddings")
    if positions is None or not rotated:
        return queries, keys
    cos, sin = (part if part.ndim == 3 else part[None] for part in positions)
    return rotate(queries.float(), cos, sin), rotate(keys.float(), cos, sin)


def _spans(call: Call, tokens: int) -> Iterator[tuple[int, int]]:
    """First and last token of each image, where several lie in one sequence."""
    borders = call.kwargs.get("cu_seqlens")
    mask = call.kwargs.get("attention_mask")
    if borders is not None:
        return pairwise(borders.tolist())
    if mask is None or tokens < 2:
        return iter([(0, tokens)])
    allowed = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    ends = (~allowed.diagonal(-1)).nonzero()[:, 0] + 1
    return pairwise([0, *ends.tolist(), tokens])


def _scaling(module: nn.Module) -> float:
    for name in ("scaling", "scale"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return float(cast(Any, module).head_dim) ** -0.5
