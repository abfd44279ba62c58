"""CDPruner: visual tokens that fit the question and differ from each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.pruning.cut import Choice, Cut, Need
from twigvlm.pruning.images import ImageTokens, Picked, Positions, choose_per_image, cut_at_input, unit
from twigvlm.pruning.view import CutView

_LEAST = 1e-6


def embedded_relevance(image: ImageTokens) -> Float[Tensor, " tokens"]:
    """Mean cosine of each visual token and the embeddings of the text behind the image, for bases without a text tower."""
    return unit(image.projected) @ unit(image.question).mean(dim=0)


@dataclass(frozen=True)
class CDPruner:
    """Before the decoder R tokens stay that are likely together under a determinantal point process given the question.

    Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity", NeurIPS 2025. The kernel is r_i ·
    cos(i, j) · r_j of projected tokens, with relevances r scaled to 0..1 in each image; the choice is greedy (Chen et al.,
    NeurIPS 2018, Algorithm 1).
    """

    relevance: Callable[[ImageTokens], Tensor] = embedded_relevance
    """Of an image's tokens to the question. The authors ask CLIP's text tower, which no LLaVA checkpoint has, and negate its
    cosines; pass a function that does so where you have one."""
    positions: Positions = "kept"
    """"compacted" as published."""
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2025, arXiv:2506.10967"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION})

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut before the decoder. Raises TwigVLMError if R̄ is not in 1..M."""
        return cut_at_input(retain, visual, layers)

    def choose(self, view: CutView, keep: Sequence[int]) -> Choice:
        """Image by image."""
        return choose_per_image(view, keep, self.pick, self.positions)

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Of one image."""
        relevance = self.relevance(image).float()
        spread = relevance.max() - relevance.min()
        scaled = (relevance - relevance.min() + _LEAST) / (spread + _LEAST)
        return Picked(greedy_determinant(unit(image.projected) * scaled[:, None], keep).sort().values)


def greedy_determinant(vectors: Float[Tensor, "tokens width"], keep: int) -> Int[Tensor, " keep"]:
    """Rows in the order in which each adds most to the determinant of the products of the chosen ones.

    Rows of the Cholesky factor are added one by one; the whole table of products is never made.
    """
    left = vectors.square().sum(dim=1)
    factor = vectors.new_zeros(keep, len(vectors))
    chosen: list[Tensor] = []
    for step in range(keep):
        best = left.argmax()
        chosen.append(best)
        products = vectors @ vectors[best] - factor[:step, best] @ factor[:step]
        factor[step] = products / left[best].clamp(min=_LEAST**2).sqrt()
        left = (left - factor[step].square()).clamp(min=0)
        left[torch.stack(chosen)] = float("-inf")
    return torch.stack(chosen)
