"""Cuts: where visual tokens leave the sequence. A pruning method is a list of cuts and a rule that chooses what stays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.errors import TwigVLMError

if TYPE_CHECKING:
    from twigvlm.pruning.view import CutView


@dataclass(frozen=True)
class Cut:
    """After `layer` decoder layers, visual tokens leave the sequence; `keep` of them stay."""

    layer: int
    """0: before the decoder."""
    keep: int
    """0: none (FinalWipe)."""


class Need(Enum):
    """What a method looks at, as `twigvlm methods` lists it.

    `VISION` and `LAST_LAYER` are stored only for methods that name them. The others name what a method computes by itself.
    """

    VISION = "vision features"
    TOWER_ATTENTION = "vision attention"
    LAST_LAYER = "attention of the layer before a cut"
    NEXT_LAYER = "attention of the layer after a cut"
    TWIG = "a trained twig"


class Choice(NamedTuple):
    """Which tokens stay after a cut."""

    stays: Bool[Tensor, "batch tokens"]
    """True at the visual tokens that stay."""
    hidden: Float[Tensor, "batch tokens width"] | None = None
    """States of all tokens, if dropped ones merge into others; None: no state changes."""
    compacted: bool = False
    """Whether the remaining tokens get consecutive positions."""


@runtime_checkable
class Pruner(Protocol):
    """A pruning method."""

    @property
    def needs(self) -> frozenset[Need]:
        """What it looks at beside the states of the tokens. `VISION` and `LAST_LAYER` must be named if it needs them."""

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """Its schedule for a prompt. The layers of the cuts must depend only on the method.

        Args:
            retain: R̄, number of visual tokens averaged over all layers; None: the method has cuts of its own.
            visual: M, number of visual tokens in the prompt, at least 1.
            layers: L.

        Raises:
            TwigVLMError: the method cannot have this budget.
        """

    def choose(self, view: "CutView", keep: Sequence[int]) -> Bool[Tensor, "batch tokens"] | Choice:
        """The visual tokens that stay. Text always stays. Not called where no row keeps a visual token.

        Args:
            view: the prompts at the cut.
            keep: how many visual tokens each row keeps.

        Returns:
            A mask, True at as many visual tokens of each row, or a `Choice` if states or positions change too.
        """


def schedule(pruner: Pruner, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
    """The checked cuts of a pruner for a prompt; none for a prompt without visual tokens. Arguments as for `Pruner.cuts`.

    Raises:
        TwigVLMError: the pruner cannot have this budget, or its cuts are out of order, beyond the layers, or keep too much.
    """
    cuts = pruner.cuts(retain, visual, layers) if visual else ()
    average_visual(cuts, visual, layers)  # for its errors
    return cuts


def average_of(pruner: Pruner | None, cuts: Sequence[Cut], visual: int, layers: int) -> float:
    """R̄ of a prompt under a pruner, including the layers that run beforehand to rank the tokens (scout mode).

    Args:
        pruner: the pruner; None: there are no cuts.
        cuts: its schedule for the prompt.
        visual: M.
        layers: L.
    """
    scouting = getattr(pruner, "scouting_layers", 0) if cuts else 0
    return average_visual(cuts, visual, layers) + visual * scouting / layers


def average_visual(cuts: Sequence[Cut], visual: int, layers: int) -> float:
    """R̄ of any list of cuts: the number of visual tokens that enter a layer, averaged over the L layers (Eq. 4 and 6).

    Args:
        cuts: the cuts, in the order of their layers.
        visual: M, number of visual tokens in the prompt.
        layers: L.

    Raises:
        TwigVLMError: cuts are out of order or beyond the layers, or one keeps more than there are.
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


def solve_cuts(
    layers_of_cuts: Sequence[int],
    kept: Callable[[float], Sequence[float]],
    retain: float | None,
    visual: int,
    layers: int,
    counted: Sequence[int] | None = None,
) -> tuple[Cut, ...]:
    """The member of a family of schedules whose average is R̄, by bisection (`average_visual` says how R̄ is counted).

    Numbers of tokens are rounded to the nearest integer, so that R̄ is met to within half a token. Each cut keeps at least one.

    Args:
        layers_of_cuts: layers that the schedules cut after, ascending.
        kept: maps a parameter in 0..1 to the share of M that each cut keeps; larger parameters keep more, and 1 keeps all.
        retain: R̄; None is refused.
        visual: M, number of visual tokens in the prompt.
        layers: L.
        counted: layers after which R̄ counts the cuts, where a method's authors count in another way; None: `layers_of_cuts`.

    Raises:
        TwigVLMError: there is no budget, no schedule of the family has it (the message names the possible range), or a cut does
            not lie before the last layer.
    """
    if retain is None:
        raise TwigVLMError("pruner: needs a budget; give retain")
    if layers_of_cuts[-1] >= layers:
        raise TwigVLMError(f"cut after layer {layers_of_cuts[-1]}: needs a base of more layers than {layers}")

    counted = layers_of_cuts if counted is None else counted

    def counts(parameter: float) -> list[float]:
        exact, left = [], float(visual)
        for share in kept(parameter):
            left = min(left, max(visual * share, 1.0))
            exact.append(left)
        return exact

    def average(sizes: Sequence[float]) -> float:
        spans = zip(counted, [*counted[1:], layers], sizes, strict=True)
        return (visual * counted[0] + sum((stop - start) * size for start, stop, size in spans)) / layers

    low, high = average(counts(0.0)), average(counts(1.0))
    slack = (layers - counted[0]) / (2 * layers)  # half a token in the pruned layers
    if not low - slack <= retain <= high + slack:
        where = ", ".join(map(str, layers_of_cuts))
        raise TwigVLMError(
            f"retain={retain:g}: must be {low:.1f} to {high:.1f} for {visual} visual tokens and cuts after layer {where} of "
            f"{layers}"
        )
    below, above = 0.0, 1.0
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if average(counts(middle)) < retain else (below, middle)
    sizes = [int(size + 0.5) for size in counts(above)]
    return tuple(Cut(layer, size) for layer, size in zip(layers_of_cuts, sizes, strict=True))


def scaled_layers(published: Sequence[int], layers: int) -> tuple[int, ...]:
    """The layers of a base of L layers at the same relative depths as published ones of 32; ascending, from 1, none twice."""
    at: list[int] = []
    for layer in published:
        at.append(max(round(layer * layers / 32), at[-1] + 1 if at else 1))
    return tuple(at)
