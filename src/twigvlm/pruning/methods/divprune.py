"""DivPrune: the most diverse visual tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from twigvlm.pruning.cut import Choice, Cut, Need
from twigvlm.pruning.images import ImageTokens, Picked, Positions, choose_per_image, cut_at_input, nearest, unit
from twigvlm.pruning.view import CutView


@dataclass(frozen=True)
class DivPrune:
    """Before the decoder R tokens stay whose smallest distance, 1 − cosine, is large: greedily the farthest from all chosen.

    Alvar et al., "DivPrune", CVPR 2025. The first is the token whose nearest neighbour is the farthest away.
    """

    positions: Positions = "kept"
    """"compacted" as published."""
    paper: ClassVar[str] = "Alvar et al., CVPR 2025, arXiv:2503.02175"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION})

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut before the decoder. Raises TwigVLMError if R̄ is not in 1..M."""
        return cut_at_input(retain, visual, layers)

    def choose(self, view: CutView, keep: Sequence[int]) -> Choice:
        """Image by image."""
        return choose_per_image(view, keep, self.pick, self.positions)

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Of one image."""
        tokens = unit(image.projected)
        chosen = [nearest(tokens, tokens, exclude_self=True)[0].argmin()]
        closest = torch.full((len(tokens),), -1.0, device=tokens.device)
        for _ in range(keep - 1):
            closest = torch.maximum(closest, tokens @ tokens[chosen[-1]])
            closest[chosen[-1]] = float("inf")
            chosen.append(closest.argmin())
        return Picked(torch.stack(chosen).sort().values)
