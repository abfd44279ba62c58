"""VisPruner: the patches that the CLS token attends to most, and diverse ones among the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Need
from twigvlm.pruning.images import ImageTokens, PerImage, Picked, nearest
from twigvlm.pruning.select import best_first, unit

_REMOVED = 8  # tokens that a round of deduplication removes at most


@dataclass(frozen=True)
class VisPruner(PerImage):
    """Before the decoder: ⌊rR⌋ important patches by the CLS token's attention, and R − ⌊rR⌋ by removing duplicates of others.

    Zhang et al., "Beyond Text-Visual Attention", ICCV 2025.
    """

    important: float = 0.5
    """r, share of the kept tokens that attention chooses, 0 to 1."""
    paper: ClassVar[str] = "Zhang et al., ICCV 2025, arXiv:2412.01818v2"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise TwigVLMError(
                f"important={self.important:g}: must be 0 to 1, the share of the kept tokens that attention chooses"
            )

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the tokens of one image."""
        ranked = best_first(image.importance)
        important = int(keep * self.important)
        kept = ranked[:important]
        if important < keep:
            others = without_duplicates(unit(image.features), ranked[important:], keep - important)
            kept = torch.cat((kept, others))
        return Picked(kept.sort().values)


def without_duplicates(
    tokens: Float[Tensor, "tokens width"], ranked: Int[Tensor, " pool"], keep: int
) -> Int[Tensor, " keep"]:
    """A pool of tokens after rounds of deduplication.

    Each round splits the pool into tokens of even and of odd rank, and removes up to eight of even rank, those that are the most
    similar to a token of odd rank. As in the authors' code, the next round ranks the remaining ones of even rank first, the
    most similar one at their head, and then those of odd rank.

    Args:
        tokens: features of length 1, of all tokens.
        ranked: indices of the pool, the most important token first.
        keep: how many tokens are left; at least 1.
    """
    while len(ranked) > keep:
        even, odd = ranked[::2], ranked[1::2]
        count = min(_REMOVED, len(ranked) - keep, len(even))
        similar = nearest(tokens[even], tokens[odd])[0]
        ranked = torch.cat((even[best_first(similar)[count:]], odd))
    return ranked
