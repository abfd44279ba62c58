"""Which tokens stay: the visual tokens with the highest scores, and all text."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_visual(
    scores: Float[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"], keep: int
) -> Int[Tensor, "batch kept"]:
    """Indices of all text tokens and of the `keep` visual tokens with the highest scores, ascending.

    Of equal scores the earlier token stays. Rows must have equally many text tokens.

    Raises:
        ValueError: a row has fewer than `keep` visual tokens, or rows differ in their number of text tokens.
    """
    text = (~visual_mask).sum(dim=1)
    if bool((text != text[0]).any()) or int(visual_mask.sum(dim=1).min()) < keep:
        raise ValueError(f"rows need {keep} visual tokens and equally many text tokens")
    ranked = scores.masked_fill(~visual_mask, float("inf")).nan_to_num(nan=float("-inf"), posinf=float("inf"))
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    return order[:, : int(text[0]) + keep].sort(dim=1).values


def text_only(visual_mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch text"]:
    """Indices of all text tokens, ascending (FinalWipe). Rows must have equally many of them."""
    return (~visual_mask).nonzero()[:, 1].reshape(visual_mask.shape[0], -1)


def gather_tokens(
    hidden: Float[Tensor, "batch tokens width"], indices: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """The hidden states of the tokens at `indices`."""
    return torch.take_along_dim(hidden, indices.unsqueeze(-1), dim=1)
