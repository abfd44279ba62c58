"""The budget: average kept tokens R̄ over all layers, and kept tokens R of the pruned layers (Eq. 4 and 6)."""

from math import floor, isfinite

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Cut, average_visual


def average_kept(keep: int, visual: int, layers: int, trunk: int, final_wipe: int) -> float:
    """R̄ = [M·K + R·(K_f − K)] / L.

    Args:
        keep: R, visual tokens kept in layers K+1..K_f.
        visual: M, visual tokens of the prompt.
        layers: L.
        trunk: K.
        final_wipe: K_f; L for no FinalWipe.

    Raises:
        TwigVLMError: K_f is not in K+1..L, or R not in 1..M.
    """
    _check_layers(layers, trunk, final_wipe)
    if not 1 <= keep <= visual:
        raise TwigVLMError(f"keep={keep}: must be 1 to {visual}, the visual tokens of this prompt")
    return average_visual((Cut(trunk, keep), Cut(final_wipe, 0)), visual, layers)


def solve_keep(retain: float, visual: int, layers: int, trunk: int, final_wipe: int) -> int:
    """R, rounded to the nearest integer, for an average R̄ (`retain`); arguments as in `average_kept`.

    Raises:
        TwigVLMError: K_f is not in K+1..L, or no R in 1..M has this average; the message names the possible range.
    """
    _check_layers(layers, trunk, final_wipe)
    exact = (retain * layers - visual * trunk) / (final_wipe - trunk)
    keep = floor(exact + 0.5) if isfinite(exact) else 0
    if not 1 <= keep <= visual:
        low = average_kept(1, visual, layers, trunk, final_wipe)
        high = average_kept(visual, visual, layers, trunk, final_wipe)
        raise TwigVLMError(
            f"retain={retain:g}: must be {low:.1f} to {high:.1f} for {visual} visual tokens, "
            f"{trunk} trunk layers and FinalWipe after layer {final_wipe} of {layers}"
        )
    return keep


def average_scouted(keep: int, visual: int, layers: int, trunk: int) -> float:
    """R̄ = R + M·K/L: what the decoder keeps in all its layers, and the pass of the trunk that ranks.

    The twig's layers do not count, as in the paper's Eq. 6.

    Args:
        keep: R.
        visual: M.
        layers: L.
        trunk: K.
    """
    return keep + visual * trunk / layers


def solve_scouted(retain: float, visual: int, layers: int, trunk: int) -> int:
    """R, rounded to the nearest integer, for an average R̄ (`retain`); arguments as of `average_scouted`.

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


def _check_layers(layers: int, trunk: int, final_wipe: int) -> None:
    if not trunk < final_wipe <= layers:
        raise TwigVLMError(f"final_wipe={final_wipe}: must be {trunk + 1} to {layers} (no FinalWipe)")
