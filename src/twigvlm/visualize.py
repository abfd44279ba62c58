"""Show which visual tokens were kept, on the picture itself."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from twigvlm.errors import TwigVLMError

FRAME = (255, 140, 0)
"""Colour of the line around kept regions."""

MAX_SIDE = 8192
"""Pixels of the longer side beyond which no picture is enlarged: picture formats have limits."""


def highlight(
    image: Image.Image,
    kept: Iterable[int],
    grid: tuple[int, int],
    box: tuple[int, int, int, int] | None = None,
    min_side: int = 672,
) -> Image.Image:
    """The picture with kept patches as they are, framed, and every other patch faded.

    Args:
        image: the picture that was asked about.
        kept: indices of the kept visual tokens, counted row by row from the top left patch.
        grid: rows and columns of patches.
        box: the part of the picture (left, top, right, bottom) that the grid covers; None is all of it.
        min_side: smaller pictures are enlarged until their shorter side has this many pixels, or the longer one `MAX_SIDE`.

    Returns:
        A new RGB image; `image` is left as it was.
    """
    rows, columns = grid
    chosen: NDArray[np.bool_] = np.zeros(rows * columns, dtype=bool)
    for index in kept:
        if not 0 <= index < rows * columns:
            raise TwigVLMError(
                f"kept index {index}: the grid of {rows}x{columns} patches has 0 to {rows * columns - 1}"
            )
        chosen[index] = True
    chosen = chosen.reshape(rows, columns)
    scale = max(1.0, min(min_side / min(image.size), MAX_SIDE / max(image.size)))
    picture = image.convert("RGB").resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )
    left, top, right, bottom = (side * scale for side in (box or (0, 0, *image.size)))
    xs = [round(left + (right - left) * column / columns) for column in range(columns + 1)]
    ys = [round(top + (bottom - top) * row / rows) for row in range(rows + 1)]

    grey = picture.convert("L").convert("RGB")
    result = Image.blend(grey, Image.new("RGB", picture.size, "white"), 0.72)
    for row, column in np.argwhere(chosen).tolist():
        patch = (xs[column], ys[row], xs[column + 1], ys[row + 1])
        result.paste(picture.crop(patch), patch[:2])
    _frame(ImageDraw.Draw(result), chosen, xs, ys, width=max(2, min(picture.size) // 300))
    return result


def _frame(
    draw: ImageDraw.ImageDraw,
    chosen: NDArray[np.bool_],
    xs: list[int],
    ys: list[int],
    width: int,
) -> None:
    """A line wherever a kept patch meets one that is not, or the border of the grid."""
    padded = np.pad(chosen, 1)
    for row, column in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]).tolist():
        draw.line([(xs[column], ys[row]), (xs[column + 1], ys[row])], fill=FRAME, width=width)
    for row, column in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]).tolist():
        draw.line([(xs[column], ys[row]), (xs[column], ys[row + 1])], fill=FRAME, width=width)
