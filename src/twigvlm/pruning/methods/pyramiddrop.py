"""PyramidDrop: a cut after each of several stages, by the attention of the layer that follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from twigvlm.base.layers import project_keys
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Choice, Cut, Need, scaled_layers, solve_cuts
from twigvlm.pruning.images import Positions
from twigvlm.pruning.methods.twig_attention import layer_scores
from twigvlm.pruning.select import top_visual
from twigvlm.pruning.view import CutView


@dataclass(frozen=True)
class PyramidDrop:
    """At each cut a share λ of the visual tokens stays, those that the last prompt token attends to most in the next layer.

    Xing et al., "PyramidDrop", CVPR 2025. The authors cut after layers 8, 16 and 24 of 32, which has no average below
    a quarter of M; so the default cuts earlier, and λ follows from the budget.
    """

    layers: tuple[int, ...] = (2, 8, 16)
    """Layers that it cuts after in a base of 32 layers; in others they lie at the same relative depths."""
    positions: Positions = "kept"
    """"compacted" as published."""
    paper: ClassVar[str] = "Xing et al., CVPR 2025, arXiv:2410.17247"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.NEXT_LAYER})

    def __post_init__(self) -> None:
        if not self.layers or self.layers[0] < 1 or list(self.layers) != sorted(set(self.layers)):
            raise TwigVLMError(f"layers={self.layers}: must be one or more layers, counted from 1 and ascending")

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """Cuts that keep λM, λ²M, λ³M, … tokens. Raises TwigVLMError if no λ has this average."""
        powers = range(1, len(self.layers) + 1)
        at = scaled_layers(self.layers, layers)
        return solve_cuts(at, lambda share: [share**power for power in powers], retain, visual, layers)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"] | Choice:
        """The visual tokens with the most attention."""
        layer, tokens = view.base.layers[view.layer], view.tokens
        keys = project_keys(layer, tokens.hidden, tokens.inputs)
        stays = top_visual(layer_scores(layer, tokens.hidden, keys, tokens, "last"), tokens.visual, keep)
        return Choice(stays, None, self.positions == "compacted")
