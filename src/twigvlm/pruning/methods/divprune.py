"""DivPrune: the most diverse visual tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from twigvlm.pruning.images import ImageTokens, PerImage, Picked, nearest
from twigvlm.pruning.select import unit


@dataclass(frozen=True)
class DivPrune(PerImage):
    """Before the decoder R tokens stay whose smallest distance, 1 − cosine, is large: greedily the farthest from all chosen.

    Alvar et al., "DivPrune", CVPR 2025. The first is the token whose nearest neighbour is the farthest away.
    """

    paper: ClassVar[str] = "Alvar et al., CVPR 2025, arXiv:2503.02175"

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the tokens of one image."""
        tokens = unit(image.projected)
        chosen = [nearest(tokens, tokens, exclude_self=True)[0].argmin()]
        closest = torch.full((len(tokens),), -1.0, device=tokens.device)
        for _ in range(keep - 1):
            closest = torch.maximum(closest, tokens @ tokens[chosen[-1]])
            closest[chosen[-1]] = float("inf")
            chosen.append(closest.argmin())
        return Picked(torch.stack(chosen).sort().values)
