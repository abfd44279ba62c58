"""CDPruner: visual tokens that fit the question and differ from each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from twigvlm.pruning.images import ImageTokens, PerImage, Picked
from twigvlm.pruning.select import greedy_determinant, unit

_LEAST = 1e-6


def embedded_relevance(image: ImageTokens) -> Float[Tensor, " tokens"]:
    """Mean cosine of each visual token and the embeddings of the text after the last image, for bases without a text tower."""
    return unit(image.projected) @ unit(image.question).mean(dim=0)


@dataclass(frozen=True)
class CDPruner(PerImage):
    """Before the decoder R tokens stay that are likely together under a determinantal point process for the question.

    Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity", NeurIPS 2025. The kernel is r_i ·
    cos(i, j) · r_j of projected tokens, with relevances r scaled to 0..1 in each image; the choice is greedy (Chen et al.,
    NeurIPS 2018, Algorithm 1).
    """

    relevance: Callable[[ImageTokens], Tensor] = embedded_relevance
    """Relevance of an image's tokens to the question. The authors ask CLIP's text tower, which no LLaVA checkpoint has: if you
    have one, pass `ClipRelevance(clip, clip_tokenizer, base_tokenizer)`."""
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2025, arXiv:2506.10967"

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the tokens of one image."""
        relevance = self.relevance(image).float()
        spread = relevance.max() - relevance.min()
        scaled = (relevance - relevance.min() + _LEAST) / (spread + _LEAST)
        return Picked(greedy_determinant(unit(image.projected) * scaled[:, None], keep).sort().values)
