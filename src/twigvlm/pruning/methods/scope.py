"""SCOPE: visual tokens that matter and cover the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.pruning.cut import Need
from twigvlm.pruning.images import ImageTokens, PerImage, Picked
from twigvlm.pruning.select import unit

_CHUNK = 64  # gains that are computed at a time
_CANDIDATES = 16


@dataclass(frozen=True)
class Scope(PerImage):
    """Before the decoder R patches stay, greedily those with the largest gain in coverage times importance.

    Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning", NeurIPS 2025. The coverage is Σ_i max_j cos(i, j)
    over the chosen j (facility location, on features before the projector), the importance the CLS token's attention.
    """

    paper: ClassVar[str] = "Deng et al., NeurIPS 2025, arXiv:2510.24214"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the tokens of one image."""
        weights = image.vision.importance("sum")[image.rows]
        return Picked(greedy_cover(unit(image.features), weights, keep).sort().values)


def greedy_cover(
    tokens: Float[Tensor, "tokens width"], weights: Float[Tensor, " tokens"], keep: int
) -> Int[Tensor, " keep"]:
    """Tokens in the order in which they are chosen, each with the largest weights[j] · Σ_i max(0, cos(i, j) − best_i).

    Here best_i is the largest cosine of token i and a chosen one. Gains only shrink while tokens are chosen, so that earlier
    gains bound later ones: only a few are computed in each step, and no table of all similarities is made.

    Args:
        tokens: features of length 1.
        weights: weight of each token's gain, 0 or more.
        keep: how many tokens are chosen, at most all.
    """
    best = torch.zeros(len(tokens), device=tokens.device)
    bounds = torch.cat([(part @ tokens.T).clamp(min=0).sum(dim=1) for part in tokens.split(_CHUNK)]) * weights
    chosen: list[Tensor] = []
    for _ in range(keep):
        current = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        while True:
            candidates = bounds.masked_fill(current, float("-inf")).topk(min(_CANDIDATES, len(tokens))).indices
            gains = ((tokens[candidates] @ tokens.T - best).clamp(min=0).sum(dim=1)) * weights[candidates]
            bounds[candidates] = torch.where(bounds[candidates].isinf(), bounds[candidates], gains)
            current[candidates] = True
            largest = bounds.argmax()
            if bool(current[largest]):
                break
        chosen.append(largest)
        best = torch.maximum(best, tokens @ tokens[largest])
        bounds[largest] = float("-inf")
    return torch.stack(chosen)
