"""Rotary position embeddings as plain tensors: a pair (cos, sin), each [batch, tokens, rotary_dim]."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""(cos, sin) of each token's position, as decoder layers take them: [batch, tokens, rotary_dim]."""


def select_rope(rope: Rope, indices: Int[Tensor, "batch kept"]) -> Rope:
    """The embeddings of the tokens at `indices`: kept tokens keep the positions they had."""
    cos, sin = rope
    index = indices.unsqueeze(-1)
    return torch.take_along_dim(cos, index, dim=1), torch.take_along_dim(sin, index, dim=1)


def slice_rope(rope: Rope, start: int, stop: int) -> Rope:
    """The embeddings of tokens start..stop-1, as views."""
    return rope[0][:, start:stop], rope[1][:, start:stop]


def rotate(
    states: Float[Tensor, "batch heads tokens head_dim"],
    cos: Float[Tensor, "#batch tokens rotary_dim"],
    sin: Float[Tensor, "#batch tokens rotary_dim"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Rotate queries or keys (RoFormer's rotation, halves convention: component i is paired with i + rotary_dim/2).

    Components beyond rotary_dim (partial rotary) stay as they are.
    """
    width = cos.shape[-1]
    half = width // 2
    turned, rest = states[..., :width], states[..., width:]
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = turned * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
