"""FasterVLM: the patches that the CLS token of the vision tower attends to most."""

from dataclasses import dataclass
from typing import ClassVar

from twigvlm.pruning.cut import Need
from twigvlm.pruning.images import ImageTokens, PerImage, Picked, top


@dataclass(frozen=True)
class FasterVLM(PerImage):
    """Before the decoder the R patches stay that the CLS token attends to most, in the block whose output the features are.

    Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning" (2024).
    """

    paper: ClassVar[str] = "Zhang et al., 2024, arXiv:2412.01818"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the tokens of one image."""
        return Picked(top(image.importance, keep))
