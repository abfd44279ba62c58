"""Random choice: the floor that any ranking must beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from twigvlm.pruning.view import TrunkOutput


@dataclass(frozen=True)
class RandomScores:
    """Scores drawn uniformly; a prompt's own length and the seed decide the choice."""

    seed: int = 0

    def __call__(self, trunk: TrunkOutput) -> Tensor:
        """Scores [batch, tokens]."""
        mask = trunk.tokens.visual
        scores = torch.zeros(mask.shape)
        for row, length in enumerate(trunk.tokens.lengths):
            scores[row, :length] = torch.rand(length, generator=torch.Generator().manual_seed(self.seed))
        return scores.to(mask.device)
