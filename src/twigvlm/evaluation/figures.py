"""Draw figures with matplotlib."""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from math import ceil, isnan
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.compare import BASE, LENGTHS, Line
from twigvlm.evaluation.summary import Accuracy, Speed
from twigvlm.evaluation.variants import NONE, Variant
from twigvlm.visualize import highlight

_COLUMNS = 4


def figure_class() -> Any:
    """matplotlib's class `Figure`, which draws without a display.

    Raises:
        TwigVLMError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TwigVLMError("a figure needs matplotlib; run: pip install 'twigvlm[report]'") from None
    return Figure


def show_scores(
    axes: Any,
    image: Image.Image,
    scores: Float[Tensor, "rows columns"],
    box: tuple[int, int, int, int] | None,
) -> None:
    """Draw the scores of patches over a picture. Colours range from the lowest score to the highest, by the square root.

    Args:
        axes: matplotlib axes that show the picture.
        image: the picture.
        scores: scores of its patches, [rows, columns].
        box: the part of the picture (left, top, right, bottom) that the patches cover; None: all of it.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    axes.imshow(
        scores.float().cpu().numpy() ** 0.5,
        extent=(left, right, bottom, top),
        cmap="inferno",
        alpha=0.7,
        interpolation="nearest",
    )


def draw_patches(
    image: Image.Image,
    maps: Mapping[str, Float[Tensor, "rows columns"]],
    kept: Mapping[str, Iterable[int]],
    box: tuple[int, int, int, int] | None = None,
) -> bytes:
    """A PNG with the picture, the scores of its patches, and the kept patches, side by side.

    Args:
        image: the picture that was asked about.
        maps: scores [rows, columns] by title; each map has its own scale, from its lowest to its highest score.
        kept: indices of kept patches by title, counted row by row.
        box: the part of the picture (left, top, right, bottom) that the patches cover; None is all of it.
    """
    height, width = next(iter(maps.values())).shape
    count = 1 + len(maps) + len(kept)
    rows, columns = ceil(count / _COLUMNS), min(count, _COLUMNS)
    size = (3.2 * columns, (3.2 * image.height / image.width + 0.4) * rows)
    figure = figure_class()(figsize=size, layout="constrained", facecolor="white")
    panels = iter(figure.subplots(rows, columns, squeeze=False).flat)

    def panel(title: str, picture: Image.Image) -> Any:
        axes = next(panels)
        axes.set_title(title, fontsize=10)
        axes.imshow(picture, extent=(0, image.width, image.height, 0))
        return axes

    panel("picture", image)
    for title, scores in maps.items():
        show_scores(panel(title, image.convert("L").convert("RGB")), image, scores, box)
    for title, indices in kept.items():
        panel(title, highlight(image, indices, (height, width), box))
    for axes in figure.axes:
        axes.set(xlim=(0, image.width), ylim=(image.height, 0))
        axes.set_axis_off()
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def undrawn(base: Iterable[Accuracy]) -> str | None:
    """Why there is nothing to draw, since RelAcc needs right answers of the base; None: there is something to draw.

    Args:
        base: accuracies of the base, one for each length of answers.
    """
    figures = list(base)
    if any(not isnan(one.relative) for one in figures):
        return None
    graded = any(not isnan(one.exact) for one in figures)
    return "no answer of the base is right" if graded else "descriptions alone have no RelAcc"


def draw_accuracy(accuracies: Sequence[Accuracy], variants: Sequence[Variant], path: Path) -> None:
    """Draw RelAcc in percent over R̄ with its interval, a line per method, K_f and φ.

    Args:
        accuracies: figures of all variants, the one without pruning among them.
        variants: the variants.
        path: file to write, PNG or SVG by its ending.

    Raises:
        TwigVLMError: matplotlib is missing.
    """
    figures = {one.name: one for one in accuracies}
    figure = figure_class()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, int | None, float], list[Variant]] = {}
    for variant in variants:
        if variant.retain is not None:
            lines.setdefault(variant.way, []).append(variant)
    several = len({(final_wipe, share) for _, final_wipe, share in lines if final_wipe is not None}) > 1
    for (method, final_wipe, share), members in lines.items():
        members = sorted(members, key=lambda variant: variant.retain or 0.0)
        points = [figures[variant.name] for variant in members]
        middle, error = percent_and_error(points)
        style = {"twig": "-", "attention": "-", "twig-text": "-"}.get(
            method, "--" if method.startswith("deep") else ":"
        )
        label = f"{method}, K_f {final_wipe}, φ {share:g}" if several and final_wipe is not None else method
        axes.errorbar(
            [one.average for one in points],
            middle,
            yerr=error,
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


def drawn_lengths(lines: Sequence[Line]) -> list[str]:
    """Lengths of answers for which `draw_comparison` draws a row: those with a right answer of the base."""
    base = next(line for line in lines if line.combination == BASE)
    return [length for length in LENGTHS if length in base.quality and not isnan(base.quality[length].relative)]


def draw_comparison(lines: Sequence[Line], path: Path) -> None:
    """Draw RelAcc in percent over R̄, and over the time of an answer relative to the base's; a row per length of answers.

    Args:
        lines: lines of `compare`, with at least one of `drawn_lengths`.
        path: file to write, PNG or SVG by its ending.
    """
    base, lengths = next(line for line in lines if line.combination == BASE), drawn_lengths(lines)
    across = 2 if base.times else 1
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.combination.label, []).append(line)
    size = 5.5 * across + 2.5, max(4 * len(lengths), legend_height(len(groups)))
    figure = figure_class()(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(len(lengths), across, squeeze=False)
    for length, row in zip(lengths, panels, strict=True):
        drawn = set()  # drafts change the time alone
        for number, (label, members) in enumerate(groups.items()):
            style = {"color": f"C{number % 10}", "marker": "osD^vPX*"[number // 10 % 8], "label": label, "linewidth": 1}
            quality = [line.quality[length] for line in members]
            if members[0].combination.variant not in drawn:
                row[0].errorbar([line.average for line in members], *percent_and_error(quality), capsize=2, **style)
                drawn.add(members[0].combination.variant)
            if length in base.times:
                shares = [100 * line.times[length].share for line in members]
                row[1].plot(shares, [100 * one.relative for one in quality], **style)
        row[0].set(xlabel="average visual tokens over all layers, R̄", ylabel=f"RelAcc of {length} answers, %")
        if length in base.times:
            row[1].set(xlabel=f"time of a {length} answer, % of the base's", ylabel=f"RelAcc of {length} answers, %")
        for axes in row:
            axes.axhline(100, color="grey", linewidth=0.8)
            axes.grid(alpha=0.3)
    # A panel without times, or without lines that differ in their drafts alone, has fewer entries than others.
    legends = [axes.get_legend_handles_labels() for axes in panels.flat]
    entries = {label: handle for handles, labels in legends for handle, label in zip(handles, labels, strict=True)}
    shown = [label for label in groups if label in entries]
    figure.legend([entries[label] for label in shown], shown, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)


def legend_height(entries: int) -> float:
    """Inches that a legend of one column needs in a figure, at a font size of 8."""
    return 0.3 + 0.18 * entries


def percent_and_error(points: Sequence[Accuracy | Speed]) -> tuple[list[float], list[list[float]]]:
    """RelAcc or RelSpd of each point in percent, and the lengths of its error bars below and above, 0 without an interval."""
    low = [100 * max(0.0, one.relative - one.interval[0]) for one in points]
    high = [100 * max(0.0, one.interval[1] - one.relative) for one in points]
    return [100 * one.relative for one in points], [low, high]
