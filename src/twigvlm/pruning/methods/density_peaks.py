"""Clusters around density peaks, by which SparseVLM recycles tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.pruning.select import best_first

_CHUNK = 64  # rows of distances that are computed at a time


def density_peaks(
    states: Float[Tensor, "tokens width"], clusters: int
) -> tuple[Int[Tensor, " clusters"], Int[Tensor, " tokens"]]:
    """Centres, and the cluster of each token, by Du et al.'s density peaks of nearest neighbours (DPC-KNN).

    A token's density is exp(−mean squared distance to its nearest tokens, as many as there are clusters); centres are the
    tokens with the largest product of density and distance to the nearest denser token. Of equals the first is chosen.
    Distances are Euclidean, divided by the square root of the width.

    Args:
        states: the tokens, in float32.
        clusters: number of clusters, at most that of the tokens.
    """
    nearest = min(clusters, len(states))
    density = torch.cat([_density(part, states, nearest) for part in states.split(_CHUNK)])
    gaps = []
    for part, of_part in zip(states.split(_CHUNK), density.split(_CHUNK), strict=True):
        distances = _distances(part, states)
        farthest = distances.max(dim=1).values
        gap = distances.masked_fill(density <= of_part[:, None], float("inf")).min(dim=1).values
        gaps.append(torch.where(gap.isinf(), farthest, gap))
    centers = best_first(density * torch.cat(gaps))[:clusters]
    cluster = torch.cat([_distances(part, states[centers]).argmin(dim=1) for part in states.split(_CHUNK)])
    cluster[centers] = torch.arange(len(centers), device=states.device)
    return centers, cluster


def _density(rows: Tensor, others: Tensor, nearest: int) -> Tensor:
    squares = _distances(rows, others).square()
    return squares.topk(nearest, largest=False).values.mean(dim=1).neg().exp()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances over the square root of the width."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[1] ** 0.5
