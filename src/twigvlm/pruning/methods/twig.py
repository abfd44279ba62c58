"""The method's own pruning: a cut after layer K by a ranking at the last prompt token, and FinalWipe (§3.3, Eq. 4 and 6)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import solve_keep, twig_cuts
from twigvlm.pruning.cut import Cut, Need
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.select import Select, best, best_of_each_image
from twigvlm.pruning.view import CutView, Scorer, TrunkOutput
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
    """Chooses among the ranked tokens."""
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
        """R of the visual tokens, by their scores; after layer K_f φR of those."""
        assert view.trunk is not None, "the cuts follow layer K"
        scores, tokens = self._scores(view.trunk), view.tokens
        if tokens.index is not None:
            last = scores.shape[1] - 1  # what follows the prompt is text
            scores = scores.gather(1, tokens.index.clamp(max=last))
        return self.select(scores, tokens.hidden, tokens.visual, keep)

    def _scores(self, trunk: TrunkOutput) -> Float[Tensor, "batch tokens"]:
        # Only requests that share a prefix must know equal scorers as such; others may not even be hashable.
        key = self.scorer if trunk.prefix is not None and isinstance(self.scorer, Hashable) else id(self.scorer)
        if key not in trunk.scores:
            scores = self.scorer(trunk)
            shape = tuple(trunk.tokens.visual.shape)
            if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise TwigVLMError(f"scorer: returned {got}; return a tensor with a score for each token, {shape}")
            trunk.scores[key] = scores if scores.is_floating_point() else scores.float()
        return trunk.scores[key]
