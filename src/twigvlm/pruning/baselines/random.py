"""Random choice: the floor that any ranking must beat."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from twigvlm.decoding.prefill import Trunk


@dataclass(frozen=True)
class RandomScores:
    """Scores drawn uniformly; the same seed and prompt length give the same choice."""

    seed: int = 0

    def __call__(self, trunk: "Trunk") -> Tensor:
        """Scores [batch, tokens]."""
        generator = torch.Generator().manual_seed(self.seed)
        mask = trunk.prompt.visual_mask
        return torch.rand(mask.shape, generator=generator).to(mask.device)
