"""VisPruner: the patches that the CLS token attends to most, and diverse ones among the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Need
from twigvlm.pruning.images import ImageTokens, PerImage, Picked, nearest, unit

_REMOVED = 8  # tokens that a round of deduplication removes at most


@dataclass(frozen=True)
class VisPruner(PerImage):
    """Before the decoder: ⌊rR⌋ important patches by the CLS token's attention, and R − ⌊rR⌋ by removing duplicates of others.

    Zhang et al., "Beyond Text-Visual Attention", ICCV 2025.
    """

    important: float = 0.5
    """r, 0 to 1."""
    paper: ClassVar[str] = "Zhang et al., ICCV 2025, arXiv:2412.01818v2"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise TwigVLMError(
                f"important={self.important:g}: must be 0 to 1, the share of the kept tokens that attention chooses"
            )

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the tokens of one image."""
        ranked = image.importance.argsort(descending=True, stable=True)
        important = int(keep * self.important)
        kept = ranked[:important]
        if important < keep:
            others = without_duplicates(unit(image.features), ranked[important:], keep - important)
            kept = torch.cat((kept, others))
        return Picked(kept.sort().values)


def without_duplicates(
    tokens: Float[Tensor, "tokens width"], ranked: Int[Tensor, " pool"], keep: int
) -> Int[Tensor, " keep"]:
    """A ranked pool without those that, round by round, stand at even places and are the most similar to one at an odd place.

    Rounds end when `keep` are left. In the next round those of the even places that stay come first, the most similar one at
    their head, and those of the odd places follow, as in the authors' code.

    Args:
        tokens: of length 1.
        ranked: the pool, the most important ones first.
        keep: how many are left; at least 1.
    """
    while len(ranked) > keep:
        even, odd = ranked[::2], ranked[1::2]
        count = min(_REMOVED, len(ranked) - keep, len(even))
        similar = nearest(tokens[even], tokens[odd])[0]
        ranked = torch.cat((even[similar.argsort(descending=True, stable=True)[count:]], odd))
    return ranked
