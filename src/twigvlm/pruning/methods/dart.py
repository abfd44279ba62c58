"""DART: after layer K the visual tokens that duplicate a few pivots the least."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.layers import project_keys
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Cut, Need, solve_cuts
from twigvlm.pruning.images import shares
from twigvlm.pruning.question import question_mask
from twigvlm.pruning.select import best_first, unit
from twigvlm.pruning.view import CutView

_PIVOTS = 4  # of the image, and as many of the text
_SHARES = 2 * _PIVOTS


@dataclass(frozen=True)
class Dart:
    """After layer K: four visual pivots, and for each of them and of four text pivots the tokens that are least similar to it.

    Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025.
    Pivots have the largest L1 norm of layer K's keys; similarity is the cosine of states after the final norm.
    """

    layer: int = 2
    """K."""
    accounting: Literal["true", "published"] = "true"
    """"published": what stays after layer K are the four visual pivots, and for each of the eight pivots an eighth of R̄, rounded
    down."""
    paper: ClassVar[str] = "Wen et al., EMNLP 2025, arXiv:2502.11494"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAST_LAYER})

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise TwigVLMError(
                f"layer={self.layer}: must be 1 or more, DART chooses its pivots by the keys of that layer"
            )

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut: M tokens in layers 1..K, R in the others. Raises TwigVLMError if no R has this average."""
        counted = (self.layer,) if self.accounting == "true" else (0,)
        (cut,) = solve_cuts((self.layer,), lambda share: (share,), retain, visual, layers, counted)
        if self.accounting == "true":
            return (cut,)
        return (Cut(self.layer, min(_SHARES * (cut.keep // _SHARES) + _PIVOTS, visual)),)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """The pivots of each prompt, and the visual tokens that duplicate them the least."""
        tokens, base = view.tokens, view.base
        norms = project_keys(base.layers[view.layer - 1], view.before, tokens.inputs).float().abs().sum(dim=(1, 3))
        states = unit(base.norm(tokens.hidden).to(tokens.hidden).flatten(0, 1)).view(tokens.hidden.shape)
        asking = view.remaining(question_mask(view.prompt))
        stays = torch.zeros_like(tokens.visual)
        for row, count in enumerate(keep):
            visual, text = (part[row].nonzero()[:, 0] for part in (tokens.visual, asking))
            stays[row, least_similar(states[row], norms[row], visual, text, count)] = True
        return stays


def least_similar(
    states: Float[Tensor, "tokens width"],
    norms: Float[Tensor, " tokens"],
    visual: Int[Tensor, " visual"],
    text: Int[Tensor, " text"],
    keep: int,
) -> Int[Tensor, " keep"]:
    """The visual pivots, and for each pivot in turn the least similar tokens, equally many for each pivot.

    Args:
        states: states of length 1.
        norms: L1 norms of the keys, by which pivots are chosen.
        visual: indices of the visual tokens.
        text: indices of the text tokens that may be pivots.
        keep: how many visual tokens stay, at most all.
    """

    def pivots(among: Tensor, count: int) -> Tensor:
        return among[best_first(norms[among])[:count]]

    kept = pivots(visual, min(_PIVOTS, keep))
    everyone = torch.cat((kept, pivots(text, _PIVOTS)))
    pool = visual[~torch.isin(visual, kept)]
    chosen = [kept]
    for pivot, share in zip(everyone, shares(keep - len(kept), [1] * len(everyone)), strict=True):
        order = (states[pool] @ states[pivot]).argsort(stable=True)
        chosen.append(pool[order[:share]])
        pool = pool[order[share:].sort().values]
    return torch.cat(chosen)
