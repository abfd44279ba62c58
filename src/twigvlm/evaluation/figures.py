"""Figures; they need matplotlib."""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.summary import Accuracy
from twigvlm.evaluation.variants import NONE, Variant
from twigvlm.visualize import highlight

_COLUMNS = 4


def figure_class() -> Any:
    """matplotlib's `Figure`, which draws without a display.

    Raises:
        TwigVLMError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TwigVLMError("a figure needs matplotlib; run: pip install 'twigvlm[report]'") from None
    return Figure


def draw_patches(
    image: Image.Image,
    maps: Mapping[str, Float[Tensor, "rows columns"]],
    kept: Mapping[str, Iterable[int]],
    box: tuple[int, int, int, int] | None = None,
) -> bytes:
    """The picture, scores of its patches, and kept patches, side by side as a PNG.

    Args:
        image: the picture that was asked about.
        maps: scores by title; each map has its own scale, from its lowest score to its highest, by the square root.
        kept: indices of kept patches by title, counted row by row.
        box: the part of the picture (left, top, right, bottom) that the patches cover; None is all of it.
    """
    left, top, right, bottom = box or (0, 0, *image.size)
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
        panel(title, image.convert("L").convert("RGB")).imshow(
            scores.float().cpu().numpy() ** 0.5,
            extent=(left, right, bottom, top),
            cmap="inferno",
            alpha=0.7,
            interpolation="nearest",
        )
    for title, indices in kept.items():
        panel(title, highlight(image, indices, (height, width), box))
    for axes in figure.axes:
        axes.set(xlim=(0, image.width), ylim=(image.height, 0))
        axes.set_axis_off()
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def draw_accuracy(accuracies: Sequence[Accuracy], variants: Sequence[Variant], path: Path) -> None:
    """One line per method and K_f: RelAcc in percent over R̄, with its interval; PNG or SVG by the name's ending."""
    figures = {one.name: one for one in accuracies}
    figure = figure_class()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, int | None], list[Variant]] = {}
    for variant in variants:
        if variant.retain is not None:
            lines.setdefault((variant.method, variant.final_wipe), []).append(variant)
    several = len({final_wipe for _, final_wipe in lines} - {None}) > 1
    for (method, final_wipe), members in lines.items():
        members = sorted(members, key=lambda variant: variant.retain or 0.0)
        points = [figures[variant.name] for variant in members]
        middle = [100 * one.relative for one in points]
        low = [100 * (one.relative - one.interval[0]) for one in points]
        high = [100 * (one.interval[1] - one.relative) for one in points]
        style = {"twig": "-", "attention": "-", "twig-text": "-"}.get(
            method, "--" if method.startswith("deep") else ":"
        )
        label = f"{method}, K_f {final_wipe}" if several and final_wipe is not None else method
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
