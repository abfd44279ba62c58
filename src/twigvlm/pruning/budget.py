"""The budget: average kept tokens R̄ over all layers, and kept tokens R of the pruned layers (Eq. 4 and 6)."""

from math import ceil, floor, isfinite

from twigvlm.config import check_final_share
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Cut, average_visual


def twig_cuts(
    keep: int, visual: int, layers: int, trunk: int, final_wipe: int, final_share: float = 0.0
) -> tuple[Cut, ...]:
    """The cuts to R after layer K and to φR, rounded to the nearest integer, after layer K_f; with φ = 0 FinalWipe (§3.3).

    Args:
        keep: R, visual tokens kept in layers K+1..K_f.
        visual: M, visual tokens of the prompt.
        layers: L.
        trunk: K.
        final_wipe: K_f; L: there is no second cut.
        final_share: φ, share of the kept tokens that stay after layer K_f.

    Raises:
        TwigVLMError: K_f is not in K+1..L, R not in 1..M, or φ not in 0..1.
    """
    if not trunk < final_wipe <= layers:
        raise TwigVLMError(f"final_wipe={final_wipe}: must be {trunk + 1} to {layers} (no FinalWipe)")
    if not 1 <= keep <= visual:
        raise TwigVLMError(f"keep={keep}: must be 1 to {visual}, the visual tokens of this prompt")
    check_final_share(final_share)
    last = () if final_wipe == layers else (Cut(final_wipe, floor(final_share * keep + 0.5)),)
    return (Cut(trunk, keep), *last)


def average_kept(keep: int, visual: int, layers: int, trunk: int, final_wipe: int, final_share: float = 0.0) -> float:
    """R̄ = [M·K + R·(K_f − K) + φR·(L − K_f)] / L, Eq. 6 for φ = 0; arguments and errors as in `twig_cuts`."""
    return average_visual(twig_cuts(keep, visual, layers, trunk, final_wipe, final_share), visual, layers)


def solve_keep(retain: float, visual: int, layers: int, trunk: int, final_wipe: int, final_share: float = 0.0) -> int:
    """R, rounded to the nearest integer, for an average R̄ (`retain`), by Eq. 6; other arguments as in `twig_cuts`.

    Raises:
        TwigVLMError: K_f is not in K+1..L, φ not in 0..1, or no R in 1..M has this average; the message names the range.
    """
    low, high = (average_kept(keep, visual, layers, trunk, final_wipe, final_share) for keep in (1, visual))
    exact = (retain * layers - visual * trunk) / (final_wipe - trunk + final_share * (layers - final_wipe))
    keep = floor(exact + 0.5) if isfinite(exact) else 0
    if low <= retain <= high:
        return min(max(keep, 1), visual)  # the rounding of φR may have shifted it
    if not 1 <= keep <= visual:
        share = f" for all but a share of {final_share:g}" if final_share else ""
        raise TwigVLMError(
            f"retain={retain:g}: must be {low:.1f} to {high:.1f} for {visual} visual tokens, "
            f"trunk_layers={trunk} and FinalWipe after layer {final_wipe} of {layers}{share}"
        )
    return keep


def average_scouted(keep: int, visual: int, layers: int, trunk: int) -> float:
    """R̄ = R + M·K/L of scout mode: R tokens in all L layers, and M tokens in the K trunk layers that rank them before.

    The twig's layers do not count, as in the paper's Eq. 6.

    Args:
        keep: R, visual tokens that all layers of the decoder get.
        visual: M, visual tokens of the prompt.
        layers: L.
        trunk: K.
    """
    return keep + visual * trunk / layers


def solve_scouted(retain: float, visual: int, layers: int, trunk: int) -> int:
    """R, rounded to the nearest integer, for an average R̄ (`retain`); other arguments as in `average_scouted`.

    Raises:
        TwigVLMError: no R in 1..M has this average; the message names the possible range.
    """
    exact = retain - average_scouted(0, visual, layers, trunk)
    keep = floor(exact + 0.5) if isfinite(exact) else 0
    if not 1 <= keep <= visual:
        low, high = (average_scouted(size, visual, layers, trunk) for size in (1, visual))
        raise TwigVLMError(
            f"retain={retain:g}: must be {low:.1f} to {high:.1f} for {visual} visual tokens and scouting by {trunk} of "
            f"{layers} layers"
        )
    return keep


def fit_scouted(retain: float, visual: int, layers: int, trunk: int) -> int:
    """R for an average R̄ (`retain`), for a picture of any size; other arguments as in `average_scouted`.

    A picture of at most R̄ visual tokens keeps all of them. Of a larger one at least ⌈R̄/2⌉ stay, even if the trunk's layers leave
    room for fewer.
    """
    if visual <= retain:
        return visual
    possible = max(retain, average_scouted(1, visual, layers, trunk))
    return max(solve_scouted(possible, visual, layers, trunk), ceil(retain / 2))
