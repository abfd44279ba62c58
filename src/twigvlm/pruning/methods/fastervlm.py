"""FasterVLM: the patches that the CLS token of the vision tower attends to most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from twigvlm.pruning.cut import Choice, Cut, Need
from twigvlm.pruning.images import ImageTokens, Picked, Positions, choose_per_image, cut_at_input, top
from twigvlm.pruning.view import CutView


@dataclass(frozen=True)
class FasterVLM:
    """Before the decoder the R patches stay that the CLS token attends to most, in the block whose output the features are.

    Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning" (2024).
    """

    positions: Positions = "kept"
    """"compacted" as published."""
    paper: ClassVar[str] = "Zhang et al., 2024, arXiv:2412.01818"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut before the decoder. Raises TwigVLMError if R̄ is not in 1..M."""
        return cut_at_input(retain, visual, layers)

    def choose(self, view: CutView, keep: Sequence[int]) -> Choice:
        """Image by image."""
        return choose_per_image(view, keep, self.pick, self.positions)

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Of one image."""
        return Picked(top(image.importance, keep))
