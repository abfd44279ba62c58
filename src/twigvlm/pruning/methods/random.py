"""Random choice: the floor that any ranking must beat."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.base.prompt import Prompt
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Cut, Need, solve_cuts
from twigvlm.pruning.select import top_visual
from twigvlm.pruning.view import CutView, Tokens, TrunkOutput


@dataclass(frozen=True)
class RandomScores:
    """Scores drawn uniformly from 0 to 1. They depend on the prompt's tokens and the seed, not on the rest of a batch."""

    seed: int = 0

    def __call__(self, trunk: TrunkOutput) -> Float[Tensor, "batch tokens"]:
        """Scores in float32."""
        return _scores(trunk.prompt, trunk.tokens, self.seed)


@dataclass(frozen=True)
class RandomTokens:
    """One cut that keeps R visual tokens at random. The choice depends on the prompt's tokens and the seed.

    Before the decoder and after layer K are different baselines, since later layers see what earlier ones made of all tokens.
    """

    layer: int
    """Layer after which it cuts; 0: before the decoder."""
    seed: int = 0
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise TwigVLMError(f"layer={self.layer}: must be 0 (before the decoder) or more")

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut: M tokens before it, R after it. Raises TwigVLMError if no R has this average."""
        return solve_cuts((self.layer,), lambda share: (share,), retain, visual, layers)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """R of the visual tokens, drawn without replacement."""
        return top_visual(_scores(view.prompt, view.tokens, self.seed), view.tokens.visual, keep)


def _scores(prompt: Prompt, tokens: Tokens, seed: int) -> Float[Tensor, "batch tokens"]:
    scores = torch.zeros(tokens.visual.shape)
    for row, (whole, length) in enumerate(zip(prompt.lengths, tokens.lengths, strict=True)):
        # With one seed for all prompts, a benchmark of pictures at the same position would be measured under a single choice.
        prompt_seed = zlib.crc32(f"{seed} {prompt.input_ids[row, :whole].tolist()}".encode())
        generator = torch.Generator().manual_seed(prompt_seed)
        scores[row, :length] = torch.rand(length, generator=generator, device="cpu")
    return scores.to(tokens.visual.device)
