"""FastV: one cut after layer K, by that layer's attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from twigvlm.base.layers import project_keys
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Cut, Need, solve_cuts
from twigvlm.pruning.methods.twig_attention import layer_scores
from twigvlm.pruning.select import top_visual
from twigvlm.pruning.view import CutView


@dataclass(frozen=True)
class FastV:
    """After layer K the R visual tokens stay that the last prompt token attends to most: mean over heads of layer K.

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024; as in the authors' code the query is the last
    token, where the text says the mean over all.
    """

    layer: int = 2
    """K."""
    paper: ClassVar[str] = "Chen et al., ECCV 2024, arXiv:2403.06764"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAST_LAYER})

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise TwigVLMError(f"layer={self.layer}: must be 1 or more, FastV ranks by the attention of that layer")

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut: M tokens in layers 1..K, R in the others. Raises TwigVLMError if no R has this average."""
        return solve_cuts((self.layer,), lambda share: (share,), retain, visual, layers)

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """The visual tokens with the most attention."""
        layer, before = view.base.layers[view.layer - 1], view.before
        keys = project_keys(layer, before, view.tokens.inputs)
        return top_visual(layer_scores(layer, before, keys, view.tokens, "last"), view.tokens.visual, keep)
