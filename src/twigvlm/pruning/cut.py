"""Cuts: where visual tokens leave the sequence. A pruning method is a list of cuts and a rule that chooses who stays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from twigvlm.errors import TwigVLMError

if TYPE_CHECKING:
    from twigvlm.pruning.view import CutView


@dataclass(frozen=True)
class Cut:
    """Visual tokens leave after `layer` decoder layers; `keep` of them go on."""

    layer: int
    """0: before the decoder."""
    keep: int
    """0: none (FinalWipe)."""


@runtime_checkable
class Pruner(Protocol):
    """A pruning method."""

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """Its schedule for a prompt, at layers that depend on nothing but the method.

        Args:
            retain: R̄, average number of visual tokens over all layers; None: the method states its cuts itself.
            visual: M, visual tokens of the prompt, at least 1.
            layers: L.

        Raises:
            TwigVLMError: it cannot have this budget.
        """

    def choose(self, view: "CutView", keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """True at the visual tokens that go on: `keep` of each row. Text always stays. Not asked where all leave."""


def schedule(pruner: Pruner, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
    """The cuts of a pruner for a prompt; of text alone there is nothing to prune. Arguments as of `Pruner.cuts`.

    Raises:
        TwigVLMError: the pruner cannot have this budget, or its cuts are out of order, beyond the layers or keep too much.
    """
    cuts = pruner.cuts(retain, visual, layers) if visual else ()
    average_visual(cuts, visual, layers)  # for its errors
    return cuts


def average_visual(cuts: Sequence[Cut], visual: int, layers: int) -> float:
    """R̄ of any list of cuts: the average, over the L layers, of the visual tokens that enter a layer (Eq. 4 and 6).

    Args:
        cuts: in the order of their layers.
        visual: M, visual tokens of the prompt.
        layers: L.

    Raises:
        TwigVLMError: cuts out of order or beyond the layers, or one that keeps more than there is.
    """
    total, start = 0, 0
    for cut in cuts:
        if not start <= cut.layer <= layers:
            raise TwigVLMError(f"cut after layer {cut.layer}: must be {start} to {layers}, in the order of the layers")
        if not 0 <= cut.keep <= visual:
            raise TwigVLMError(f"keep={cut.keep}: must be 0 to {visual}, the visual tokens before this cut")
        total += visual * (cut.layer - start)
        start, visual = cut.layer, cut.keep
    return (total + visual * (layers - start)) / layers
