"""Accuracy over budget as a picture; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.journal import Record
from twigvlm.evaluation.summary import accuracies
from twigvlm.evaluation.variants import NONE, Variant


def draw_accuracy(records: Sequence[Record], variants: Sequence[Variant], path: Path) -> None:
    """One line per method and K_f: RelAcc in percent over R̄, with its interval; PNG or SVG by the name's ending."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TwigVLMError("a figure needs matplotlib; run: pip install 'twigvlm[report]'") from None
    figures = {one.name: one for one in accuracies(records)}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, int | None], list[Variant]] = {}
    for variant in variants:
        if variant.retain is not None:
            lines.setdefault((variant.method, variant.final_wipe), []).append(variant)
    several = len({final_wipe for _, final_wipe in lines}) > 1
    for (method, final_wipe), members in lines.items():
        members = sorted(members, key=lambda variant: variant.retain or 0.0)
        points = [figures[variant.name] for variant in members]
        middle = [100 * one.relative for one in points]
        low = [100 * (one.relative - one.interval[0]) for one in points]
        high = [100 * (one.interval[1] - one.relative) for one in points]
        style = {"twig": "-", "attention": "-", "twig-text": "-"}.get(
            method, "--" if method.startswith("deep") else ":"
        )
        label = f"{method}, K_f {final_wipe}" if several else method
        axes.errorbar(
            [variant.retain or 0.0 for variant in members],
            middle,
            yerr=[[max(0.0, value) for value in side] for side in (low, high)],
            linestyle=style,
            marker="o",
            capsize=3,
            label=label,
        )
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.set_xlabel("average visual tokens over all layers, R̄")
    axes.set_ylabel(f"accuracy, % of {figures[NONE.name].kept:g} tokens' (RelAcc)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
