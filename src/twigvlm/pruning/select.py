"""Selecting visual tokens by their scores: the best, the best of each image, or the best that differ from each other."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

_LEAST = 1e-6  # score of a token, as a share of the best one's, below which all are alike
_RIDGE = 1e-3
_TINY = 1e-12


def best_first(scores: Real[Tensor, "*rows tokens"]) -> Int[Tensor, "*rows tokens"]:
    """Indices from the highest score of each row to its lowest; of equal scores the earlier one first, and NaN as -inf."""
    inf = float("inf")  # what `nan_to_num` would make finite as well
    return scores.nan_to_num(nan=-inf, posinf=inf, neginf=-inf).argsort(dim=-1, descending=True, stable=True)


def top_visual(
    scores: Float[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"], keep: Sequence[int]
) -> Bool[Tensor, "batch tokens"]:
    """The paper's top-R choice (§3.3). Among equal scores the earlier token stays, and NaN counts as the lowest score.

    Args:
        scores: scores, read at visual tokens only.
        visual_mask: True at visual tokens.
        keep: R of each row.

    Returns:
        True at the visual tokens with the highest scores, R in each row.

    Raises:
        ValueError: a row has fewer visual tokens than it should keep.
    """
    wanted = torch.tensor(keep, device=scores.device)
    if bool((visual_mask.sum(dim=1) < wanted).any()):
        raise ValueError(f"rows of {visual_mask.sum(dim=1).tolist()} visual tokens cannot keep {list(keep)}")
    order = _visual_first(scores, visual_mask)
    chosen = torch.arange(scores.shape[1], device=scores.device) < wanted[:, None]
    return torch.zeros_like(visual_mask).scatter(1, order, chosen)


def evenly(
    scores: Float[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Scores that rank every image's best token before any image's second best, so that images share a budget evenly.

    An image, or a frame of a video, is a run of visual tokens with text before and after it.

    Args:
        scores: scores, read at visual tokens only.
        visual_mask: True at visual tokens.
    """
    tokens = scores.shape[1]
    starts = visual_mask & ~torch.nn.functional.pad(visual_mask[:, :-1], (1, 0))
    images = starts.cumsum(dim=1)
    order = _visual_first(scores, visual_mask)
    grouped = order.gather(1, images.gather(1, order).argsort(dim=1, stable=True))  # image by image, its best first
    image = images.gather(1, grouped)
    index = torch.arange(tokens, device=scores.device).expand_as(order)
    within = torch.zeros_like(order).scatter(1, grouped, index - torch.searchsorted(image, image))
    among_all = torch.zeros_like(order).scatter(1, order, index)
    return ranked(-(within * tokens + among_all))


def _visual_first(
    scores: Float[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"]
) -> Int[Tensor, "batch tokens"]:
    """Indices of visual tokens as `best_first` orders them, followed by those of text."""
    lowest = torch.finfo(scores.dtype).min  # above -inf, so that text comes after all visual tokens
    finite = scores.nan_to_num(nan=lowest, posinf=float("inf"), neginf=lowest)
    return best_first(finite.masked_fill(~visual_mask, float("-inf")))


def ranked(values: Tensor) -> Float[Tensor, "batch tokens"]:
    """Ranks as scores: 0 for the largest value of a row, -1 for the next; of equal values the earlier one is the larger.

    Sums of them with other whole numbers are exact in float32, the only precision that some devices have.
    """
    order = best_first(values)
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
    """The visual tokens with the highest scores; arguments as in `Select`."""
    return top_visual(scores, visual_mask, keep)


def best_of_each_image(
    scores: Float[Tensor, "batch tokens"],
    states: Float[Tensor, "batch tokens width"],
    visual_mask: Bool[Tensor, "batch tokens"],
    keep: Sequence[int],
) -> Bool[Tensor, "batch tokens"]:
    """The visual tokens with the highest scores, equally many of each image as far as it has them; arguments as in `Select`."""
    return top_visual(evenly(scores, visual_mask), visual_mask, keep)


def diverse(
    scores: Float[Tensor, "batch tokens"],
    states: Float[Tensor, "batch tokens width"],
    visual_mask: Bool[Tensor, "batch tokens"],
    keep: Sequence[int],
) -> Bool[Tensor, "batch tokens"]:
    """Visual tokens with high scores whose states differ: greedily the largest ∏ s_i · det[cos(h_i, h_j)].

    This approximates the likeliest choice under a determinantal point process with scores for qualities (Kulesza and Taskar,
    "Determinantal Point Processes for Machine Learning", 2012, section 3.1). Where states do not differ, scores decide.
    Arguments are as in `Select`.
    """
    chosen = torch.zeros_like(visual_mask)
    for row, count in enumerate(keep):
        if not count:
            continue
        positions = visual_mask[row].nonzero()[:, 0]
        quality = scores[row, positions].float().nan_to_num(nan=0.0).clamp(min=0)
        quality = (quality / quality.max().clamp(min=_TINY)).clamp(min=_LEAST).sqrt()
        vectors = unit(states[row, positions]) * quality[:, None]
        chosen[row, positions[greedy_determinant(vectors, count, _RIDGE)]] = True
    return chosen


def greedy_determinant(vectors: Float[Tensor, "tokens width"], keep: int, ridge: float = 0.0) -> Int[Tensor, " keep"]:
    """Rows in the order in which each adds the most to the determinant of the products of the chosen ones.

    Rows of the Cholesky factor are added one by one (Chen et al., "Fast Greedy MAP Inference for Determinantal Point
    Process", NeurIPS 2018, Algorithm 1), so that memory is `keep` numbers for each row; the table of all products is never made.

    Args:
        vectors: the rows.
        keep: how many rows are chosen, at most all.
        ridge: share by which the products of rows with themselves are enlarged, so that there is an order even among rows that
            the chosen ones span.
    """
    left = vectors.square().sum(dim=1) * (1 + ridge)
    factor = vectors.new_zeros(keep, len(vectors))
    chosen: list[Tensor] = []
    for step in range(keep):
        index = left.argmax()
        chosen.append(index)
        products = vectors @ vectors[index] - factor[:step, index] @ factor[:step]
        factor[step] = products / left[index].clamp(min=_TINY).sqrt()
        left = (left - factor[step].square()).clamp(min=0)
        left[torch.stack(chosen)] = float("-inf")
    return torch.stack(chosen)


def unit(features: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
    """Features of length 1, in float32: their products are cosines. Of a token without direction (zeros, NaN, infinity) zeros."""
    return torch.nn.functional.normalize(features.float(), dim=-1).nan_to_num(nan=0.0)


def gather_tokens(
    hidden: Float[Tensor, "batch tokens width"], indices: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """The hidden states of the tokens at `indices`."""
    return torch.take_along_dim(hidden, indices.unsqueeze(-1), dim=1)
