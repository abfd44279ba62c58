"""The method's own pruning: a cut after layer K by a ranking at the last prompt token, and FinalWipe (§3.3, Eq. 4 and 6)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.pruning.budget import solve_keep, twig_cuts
from twigvlm.pruning.cut import Cut, Need
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.select import Select, best, best_of_each_image
from twigvlm.pruning.view import CutView, Scorer, TrunkOutput, checked_scores
from twigvlm.twig.block import Twig


@dataclass(frozen=True)
class TwigPruner:
    """TwigVLM and TwigVLM++, and every other ranking under the same schedule: [Cut(K, R), Cut(K_f, φR)].

    As published φ = 0, and late layers see no picture. A base whose late layers still look at it keeps its quality with φ > 0.
    """

    scorer: Scorer
    """Ranks the visual tokens."""
    trunk_layers: int
    """K."""
    final_wipe: int
    """K_f; L: no FinalWipe."""
    final_share: float = 0.0
    """φ, share of the kept tokens that stay after layer K_f."""
    keep: int | None = None
    """R, if it is given instead of an average."""
    select: Select = best
    """Chooses by the scores."""
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TWIG})
    ranks_once: ClassVar[bool] = True
    """Later cuts use the scores of the first one, so that drafts can follow the prompt when it passes them."""

    def ranks_later(self, twig: Twig) -> bool:
        """Whether its ranking can be asked again at new tokens, as refocusing does."""
        whole = self.select is not best_of_each_image and self.trunk_layers == twig.config.trunk_layers
        return whole and self.scorer == default_scorer(twig)

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut to R after layer K, and one to φR after layer K_f.

        Raises:
            TwigVLMError: R is not in 1..M, or no R has this average.
        """
        shape = visual, layers, self.trunk_layers, self.final_wipe, self.final_share
        keep = self.keep if retain is None else solve_keep(retain, *shape)
        assert keep is not None, "one of them is given"
        return twig_cuts(keep, *shape)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """R of the visual tokens by their scores, and after layer K_f φR of those by the same scores."""
        assert view.trunk is not None, "the cuts follow layer K"
        scores, tokens = self._scores(view.trunk), view.tokens
        if tokens.index is not None:
            last = scores.shape[1] - 1  # what follows the prompt is text
            scores = scores.gather(1, tokens.index.clamp(max=last))
        return self.select(scores, tokens.hidden, tokens.visual, keep)

    def _scores(self, trunk: TrunkOutput) -> Float[Tensor, "batch tokens"]:
        # Only requests that share a prefix must know equal scorers as such; others may not even be hashable.
        equal = trunk.prefix is not None and isinstance(self.scorer, Hashable)
        key = self.scorer if equal else _Itself(self.scorer)
        if key not in trunk.scores:
            trunk.scores[key] = checked_scores(self.scorer, trunk)
        return trunk.scores[key]


@dataclass(frozen=True, eq=False)
class _Itself:
    """Stands for a scorer that is equal to nothing else, and keeps it alive: its id is not given to another one meanwhile."""

    scorer: Scorer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.scorer is self.scorer

    def __hash__(self) -> int:
        return id(self.scorer)
