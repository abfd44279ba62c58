"""Which tokens stay: the visual tokens with the highest scores, and all text."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_visual(
    scores: Float[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"], keep: Sequence[int]
) -> Bool[Tensor, "batch tokens"]:
    """True at the visual tokens with the highest scores, `keep` of each row. Of equal scores the earlier token stays.

    Raises:
        ValueError: a row has fewer visual tokens than it is to keep.
    """
    wanted = torch.tensor(keep, device=scores.device)
    if bool((visual_mask.sum(dim=1) < wanted).any()):
        raise ValueError(f"rows of {visual_mask.sum(dim=1).tolist()} visual tokens cannot keep {list(keep)}")
    ranked = scores.nan_to_num(nan=torch.finfo(scores.dtype).min).masked_fill(~visual_mask, float("-inf"))
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    chosen = torch.arange(scores.shape[1], device=scores.device) < wanted[:, None]
    return torch.zeros_like(visual_mask).scatter(1, order, chosen)


def gather_tokens(
    hidden: Float[Tensor, "batch tokens width"], indices: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """The hidden states of the tokens at `indices`."""
    return torch.take_along_dim(hidden, indices.unsqueeze(-1), dim=1)
