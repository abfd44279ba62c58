"""Scout mode: trunk and twig see the whole prompt once and rank it; all layers of the decoder then run on the kept tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.budget import solve_scouted
from twigvlm.pruning.cut import Cut, Need
from twigvlm.pruning.select import Select, best
from twigvlm.pruning.view import CutView, Scorer, TrunkOutput, checked_scores
from twigvlm.twig.block import Twig


@dataclass(frozen=True)
class ScoutPruner:
    """One cut before the decoder, to the tokens that the twig ranks highest. All layers hold equally many tokens.

    The trunk runs twice, on all tokens to rank them and on the kept ones in the decoder; in exchange a prompt's keys and
    values have one length, which is what serving engines can run.
    """

    twig: Twig
    scorer: Scorer
    """Ranks the visual tokens."""
    keep: int | None = None
    """R, if it is given instead of an average."""
    select: Select = best
    """Chooses by the scores."""
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TWIG})

    @property
    def scouting_layers(self) -> int:
        """K: base layers that all tokens pass to be ranked, in addition to the L layers after the cut."""
        return self.twig.config.trunk_layers

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut to R before the first layer.

        Raises:
            TwigVLMError: R is not in 1..M, or no R has this average.
        """
        if retain is not None:
            return (Cut(0, solve_scouted(retain, visual, layers, self.scouting_layers)),)
        assert self.keep is not None, "one of them is given"
        if not 1 <= self.keep <= visual:
            raise TwigVLMError(f"keep={self.keep}: must be 1 to {visual}, the visual tokens of this prompt")
        return (Cut(0, self.keep),)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """R of the visual tokens, by their scores in the shallow model."""
        trunk = self._scouted(view)
        return self.select(checked_scores(self.scorer, trunk), trunk.tokens.hidden, view.tokens.visual, keep)

    def _scouted(self, view: CutView) -> TrunkOutput:
        """The whole prompt after layer K, in a cache that is gone after the ranking."""
        if view.trunk is not None:  # K = 0
            return view.trunk
        base, twig, masks = view.base, self.twig, view.base.masks()
        trunk_layers, rows = twig.config.trunk_layers, len(view.tokens.hidden)
        cache = KVCache(twig.last_layer_idx + 1, (trunk_layers, twig.first_layer_idx), 1, base.device)
        rows_view = cache.view(cache.claim(rows))
        tokens = view.tokens.through(base, 0, trunk_layers, masks, rows_view)
        return TrunkOutput(base, twig, view.prompt, tokens, masks, rows_view)
