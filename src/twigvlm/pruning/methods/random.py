"""Random choice: the floor that any ranking must beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Cut, Need, solve_cuts
from twigvlm.pruning.select import top_visual
from twigvlm.pruning.view import CutView, TrunkOutput


@dataclass(frozen=True)
class RandomScores:
    """Scores drawn uniformly; a prompt's own length and the seed decide the choice."""

    seed: int = 0

    def __call__(self, trunk: TrunkOutput) -> Tensor:
        """Scores [batch, tokens]."""
        return _scores(trunk.tokens.visual, trunk.tokens.lengths, self.seed)


@dataclass(frozen=True)
class RandomTokens:
    """One cut that keeps R visual tokens at random. Before the decoder and after layer K it is not the same baseline."""

    layer: int
    """0: before the decoder."""
    seed: int = 0
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise TwigVLMError(f"layer={self.layer}: must be 0 (before the decoder) or more")

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut. Raises TwigVLMError if no R has this average."""
        return solve_cuts((self.layer,), lambda share: (share,), retain, visual, layers)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """A prompt's own length and the seed decide."""
        tokens = view.tokens
        return top_visual(_scores(tokens.visual, tokens.lengths, self.seed), tokens.visual, keep)


def _scores(mask: Bool[Tensor, "batch tokens"], lengths: Sequence[int], seed: int) -> Tensor:
    scores = torch.zeros(mask.shape)
    for row, length in enumerate(lengths):
        scores[row, :length] = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    return scores.to(mask.device)
