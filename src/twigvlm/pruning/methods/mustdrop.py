"""MustDrop under a budget: cuts after four layers, by the attention of the whole question; key tokens are dropped last."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Choice, Cut, Need, average_visual, scaled_layers, solve_cuts
from twigvlm.pruning.images import Positions
from twigvlm.pruning.question import attention_from, question_mask
from twigvlm.pruning.select import ranked, top_visual
from twigvlm.pruning.view import CutView

_LAYERS = (3, 7, 11, 15)


@dataclass(frozen=True)
class MustDrop:
    """At each cut, after the key tokens, those stay that exceed a published threshold the furthest.

    Liu et al., "Multi-Stage Vision Token Dropping" (2024). As published a token goes if the question gives it less than a
    share g of what it gives to all visual tokens, and no token of the question more than i; how many go differs from
    prompt to prompt. Here the tokens with the largest max(sum/(g·total), max/i) stay, a share λ at each cut, so that a
    budget holds. Key tokens are the 8 % that the vision tower's last block attends to most, and no cut drops one of them.

    A budget too small for that (R̄ below 97 of 576 tokens in 32 layers) leaves fewer tokens than there are key tokens after some
    cuts, which then choose among the key tokens, in the same way.
    """

    key_share: float = 0.08
    """Share of an image's patches that are key tokens, 0 to 1."""
    accounting: Literal["true", "published"] = "true"
    """"published": R̄ as the authors count it, where the layer before a cut counts with the tokens that the cut leaves."""
    positions: Positions = "kept"
    """"compacted" as published."""
    thresholds: tuple[float, float] = (0.001, 0.001)
    """g and i, as published for TextVQA and R̄ 192. Under a budget only g/i matters, which is 1 here; published are 1.2 at R̄ 128
    and 1.1 at 64."""
    paper: ClassVar[str] = "Liu et al., 2024, arXiv:2411.10803"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAST_LAYER, Need.VISION, Need.TOWER_ATTENTION})

    def __post_init__(self) -> None:
        if not 0 <= self.key_share <= 1:
            raise TwigVLMError(
                f"key_share={self.key_share:g}: must be 0 to 1, the share of the visual tokens that stays"
            )
        if not all(threshold > 0 for threshold in self.thresholds):
            raise TwigVLMError(f"thresholds={self.thresholds}: both must be more than 0")

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """Cuts that keep λM, λ²M, λ³M, λ⁴M, and all key tokens if R̄ allows it.

        Raises:
            TwigVLMError: no λ has this average.
        """
        at = scaled_layers(_LAYERS, layers)
        counted = tuple(layer - 1 for layer in at) if self.accounting == "published" else at

        def solve(least: float) -> tuple[Cut, ...]:
            sizes = [1, 2, 3, 4]
            return solve_cuts(
                at, lambda share: [max(share**power, least) for power in sizes], retain, visual, layers, counted
            )

        cuts, keys = solve(0.0), ceil(self.key_share * visual)
        if retain is None or average_visual([Cut(layer, keys) for layer in counted], visual, layers) > retain:
            return cuts
        return solve(keys / visual)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"] | Choice:
        """The key tokens, then the visual tokens that exceed a threshold the furthest."""
        visual = view.tokens.visual
        total, largest = self._attention(view)
        share, single = self.thresholds
        scores = torch.maximum(total / (share * total.sum(dim=1, keepdim=True)), largest / single)
        # Ranks, so that adding their number puts the key tokens before all others and changes no order among them.
        scores = ranked(scores) + self._is_key(view) * scores.shape[1]
        return Choice(top_visual(scores, visual, keep), None, self.positions == "compacted")

    def _attention(self, view: CutView) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch tokens"]]:
        """Sum and maximum over the question of the attention to each visual token, mean over heads."""
        total = torch.zeros(view.tokens.visual.shape, device=view.tokens.hidden.device)
        largest = total
        for shares, asks, _ in attention_from(view, question_mask(view.prompt)):
            given = shares.mean(dim=1) * asks[..., None] * view.tokens.visual[:, None]
            total, largest = total + given.sum(dim=1), torch.maximum(largest, given.max(dim=1).values)
        return total, largest

    def _is_key(self, view: CutView) -> Bool[Tensor, "batch tokens"]:
        """True at the key tokens among the tokens that are left."""
        prompt, vision = view.prompt, view.prompt.vision
        assert vision is not None, "it is among what the method needs"
        patch = prompt.visual_mask & (vision.source >= 0)
        given = vision.last_importance[vision.source.clamp(min=0)]
        counts = [ceil(self.key_share * count) for count in patch.sum(dim=1).tolist()]
        keys = top_visual(given, patch, counts)
        return view.remaining(keys)
