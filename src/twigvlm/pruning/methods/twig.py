"""The method's own pruning: one cut after layer K by a ranking at the last prompt token, and FinalWipe (§3.3, Eq. 4 and 6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.pruning.budget import average_kept, solve_keep
from twigvlm.pruning.cut import Cut, Need
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.select import Select, best, best_of_each_image
from twigvlm.pruning.view import CutView, Scorer, TrunkOutput
from twigvlm.twig.block import Twig


@dataclass(frozen=True)
class TwigPruner:
    """TwigVLM and TwigVLM++, and every other ranking under the same schedule: [Cut(K, R), Cut(K_f, 0)]."""

    scorer: Scorer
    """Ranks the visual tokens."""
    trunk_layers: int
    """K."""
    final_wipe: int
    """K_f; L: no FinalWipe."""
    keep: int | None = None
    """R, if it is given instead of an average."""
    select: Select = best
    """Chooses among the ranked tokens."""
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TWIG})

    def ranks_later(self, twig: Twig) -> bool:
        """Whether its ranking can be asked again at new tokens, as refocusing does."""
        whole = self.select is not best_of_each_image and self.trunk_layers == twig.config.trunk_layers
        return whole and self.scorer == default_scorer(twig)

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut to R after layer K, and one to 0 after layer K_f.

        Raises:
            TwigVLMError: R is not in 1..M, or no R has this average.
        """
        if retain is not None:
            keep = solve_keep(retain, visual, layers, self.trunk_layers, self.final_wipe)
        else:
            assert self.keep is not None, "one of them is given"
            keep = self.keep
            average_kept(keep, visual, layers, self.trunk_layers, self.final_wipe)  # for its errors
        wipe = () if self.final_wipe == layers else (Cut(self.final_wipe, 0),)
        return (Cut(self.trunk_layers, keep), *wipe)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """R of the visual tokens, by their scores."""
        assert view.trunk is not None, "the cut follows layer K"
        return self.select(self._scores(view.trunk), view.tokens.hidden, view.tokens.visual, keep)

    def _scores(self, trunk: TrunkOutput) -> Float[Tensor, "batch tokens"]:
        if trunk.prefix is None:
            return self.scorer(trunk)
        known = trunk.prefix.scores
        if self.scorer not in known:
            known[self.scorer] = self.scorer(trunk)
        return known[self.scorer]
