"""Selecting visual tokens by their scores: the best, the best of each image, or the best that differ from each other."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_LEAST = 1e-6  # score of a token, as a share of the best one's, below which all are alike
_RIDGE = 1e-3
_TINY = 1e-12


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
    order = _comparable(scores, visual_mask).argsort(dim=1, descending=True, stable=True)
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
    order = _comparable(scores, visual_mask).argsort(dim=1, descending=True, stable=True)
    grouped = order.gather(1, images.gather(1, order).argsort(dim=1, stable=True))  # image by image, its best first
    image = images.gather(1, grouped)
    index = torch.arange(tokens, device=scores.device).expand_as(order)
    within = torch.zeros_like(order).scatter(1, grouped, index - torch.searchsorted(image, image))
    among_all = torch.zeros_like(order).scatter(1, order, index)
    return ranked(-(within * tokens + among_all))


def _comparable(
    scores: Float[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Scores to sort by: text behind all visual tokens, and before it those whose score is NaN, which would sort as the best."""
    lowest = torch.finfo(scores.dtype).min
    finite = scores.nan_to_num(nan=lowest, posinf=float("inf"), neginf=lowest)
    return finite.masked_fill(~visual_mask, float("-inf"))


def ranked(values: Tensor) -> Float[Tensor, "batch tokens"]:
    """Scores of the same order whose differences are whole: 0 for the largest of a row, -1 for the next; of equal values the
    earlier one is the larger. No sum with other whole numbers rounds them, and devices without float64 have them too."""
    order = values.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return -torch.zeros_like(order).scatter(1, order, rank).float()


Select = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
"""(scores [batch, tokens], states [batch, tokens, width], visual tokens [batch, tokens], how many stay in each row) -> True at
those that stay, [batch, tokens]."""


def best(
    scores: Float[Tensor, "batch tokens"],
    states: Float[Tensor, "batch tokens width"],
    visual_mask: Bool[Tensor, "batch tokens"],
    keep: Sequence[int],
) -> Bool[Tensor, "batch tokens"]:
    """The visual tokens with the highest scores."""
    return top_visual(scores, visual_mask, keep)


def best_of_each_image(
    scores: Float[Tensor, "batch tokens"],
    states: Float[Tensor, "batch tokens width"],
    visual_mask: Bool[Tensor, "batch tokens"],
    keep: Sequence[int],
) -> Bool[Tensor, "batch tokens"]:
    """The visual tokens with the highest scores, as many of each image."""
    return top_visual(evenly(scores, visual_mask), visual_mask, keep)


def diverse(
    scores: Float[Tensor, "batch tokens"],
    states: Float[Tensor, "batch tokens width"],
    visual_mask: Bool[Tensor, "batch tokens"],
    keep: Sequence[int],
) -> Bool[Tensor, "batch tokens"]:
    """Visual tokens with high scores whose states differ: greedily the largest ∏ s_i · det[cos(h_i, h_j)].

    This is the likeliest choice under a determinantal point process with scores for qualities (Kulesza and Taskar,
    "Determinantal Point Processes for Machine Learning", 2012, section 3.1). Where states do not differ, scores decide.
    """
    chosen = torch.zeros_like(visual_mask)
    for row, count in enumerate(keep):
        if not count:
            continue
        positions = visual_mask[row].nonzero()[:, 0]
        quality = scores[row, positions].float().nan_to_num(nan=0.0).clamp(min=0)
        quality = (quality / quality.max().clamp(min=_TINY)).clamp(min=_LEAST).sqrt()
        directions = torch.nn.functional.normalize(states[row, positions].float(), dim=-1)
        chosen[row, positions[greedy_determinant(directions * quality[:, None], count, _RIDGE)]] = True
    return chosen


def greedy_determinant(vectors: Float[Tensor, "tokens width"], keep: int, ridge: float = 0.0) -> Int[Tensor, " keep"]:
    """Rows in the order in which each adds most to the determinant of the products of the chosen ones.

    Rows of the Cholesky factor are added one by one (Chen et al., NeurIPS 2018, Algorithm 1); the whole table of products is
    never made.

    Args:
        vectors: the rows.
        keep: how many are chosen.
        ridge: share by which the products of rows with themselves are enlarged, so that there is an order even among rows that
            the chosen ones span.
    """
    left = vectors.square().sum(dim=1) * (1 + ridge)
    factor = vectors.new_zeros(keep, len(vectors))
    chosen: list[Tensor] = []
    for step in range(keep):
        best_one = left.argmax()
        chosen.append(best_one)
        products = vectors @ vectors[best_one] - factor[:step, best_one] @ factor[:step]
        factor[step] = products / left[best_one].clamp(min=_TINY).sqrt()
        left = (left - factor[step].square()).clamp(min=0)
        left[torch.stack(chosen)] = float("-inf")
    return torch.stack(chosen)


def gather_tokens(
    hidden: Float[Tensor, "batch tokens width"], indices: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """The hidden states of the tokens at `indices`."""
    return torch.take_along_dim(hidden, indices.unsqueeze(-1), dim=1)
