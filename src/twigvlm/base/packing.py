"""Batches whose rows are differently long: each row's own tokens first, then padding."""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

Lengths = tuple[int, ...]
"""Tokens of each row of a batch."""


def left_pack(stays: Bool[Tensor, "batch tokens"]) -> tuple[Int[Tensor, "batch kept"], Lengths]:
    """Positions where the mask is true, ascending, and how many each row has; shorter rows are filled up with others."""
    lengths = tuple(stays.sum(dim=1).tolist())
    order = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return order[:, : max(lengths)], lengths


def valid_mask(lengths: Lengths, tokens: int, device: torch.device | None = None) -> Bool[Tensor, "batch tokens"]:
    """True where a row of so many tokens has one."""
    return torch.arange(tokens, device=device) < torch.tensor(lengths, device=device)[:, None]


def last_token(states: Shaped[Tensor, "batch tokens width"], lengths: Lengths) -> Shaped[Tensor, "batch width"]:
    """States of the last token of each row."""
    ends = torch.tensor(lengths, device=states.device)[:, None, None] - 1
    return torch.take_along_dim(states, ends, dim=1)[:, 0]
