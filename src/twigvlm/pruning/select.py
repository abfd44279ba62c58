"""Selecting tokens: the visual tokens with the highest scores, and all text."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_visual(
    scores: Float[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"], keep: Sequence[int]
) -> Bool[Tensor, "batch tokens"]:
    """True at the visual tokens with the highest scores, `keep` in each row. Among equal scores, the earlier token stays.

    Raises:
        ValueError: a row has fewer visual tokens than it should keep.
    """
    wanted = torch.tensor(keep, device=scores.device)
    if bool((visual_mask.sum(dim=1) < wanted).any()):
        raise ValueError(f"rows of {visual_mask.sum(dim=1).tolist()} visual tokens cannot keep {list(keep)}")
    ranked = scores.nan_to_num(nan=torch.finfo(scores.dtype).min).masked_fill(~visual_mask, float("-inf"))
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    chosen = torch.arange(scores.shape[1], device=scores.device) < wanted[:, None]
    return torch.zeros_like(visual_mask).scatter(1, order, chosen)


def evenly(
    scores: Float[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Scores that rank every image's best token before any image's second best: a budget is split evenly among images.

    An image, or a frame of a video, is a run of visual tokens with text before and after it.
    """
    tokens = scores.shape[1]
    starts = visual_mask & ~torch.nn.functional.pad(visual_mask[:, :-1], (1, 0))
    images = starts.cumsum(dim=1)
    order = scores.masked_fill(~visual_mask, float("-inf")).argsort(dim=1, descending=True, stable=True)
    grouped = order.gather(1, images.gather(1, order).argsort(dim=1, stable=True))  # image by image, its best first
    image = images.gather(1, grouped)
    place = torch.arange(tokens, device=scores.device).expand_as(order)
    within = torch.zeros_like(order).scatter(1, grouped, place - torch.searchsorted(image, image))
    among_all = torch.zeros_like(order).scatter(1, order, place)
    return -(within * tokens + among_all).double()  # exact: of 10,000 tokens a float32 would mix up ranks


def gather_tokens(
    hidden: Float[Tensor, "batch tokens width"], indices: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """The hidden states of the tokens at `indices`."""
    return torch.take_along_dim(hidden, indices.unsqueeze(-1), dim=1)
