"""Draw on a picture which of its visual tokens were kept."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from twigvlm.errors import TwigVLMError

FRAME = (255, 140, 0)
"""RGB colour of the line around kept regions."""

MAX_SIDE = 8192
"""Largest side of a drawn picture, in pixels, since picture formats have limits."""


def patch_grid(base: Any, visual_tokens: int, inputs: Mapping[str, Any] | None = None) -> tuple[int, int] | None:
    """Rows and columns of the visual tokens if they are the patches of one whole image; None for tiles and other shapes.

    Args:
        base: Hugging Face model.
        visual_tokens: M, number of visual tokens of the prompt.
        inputs: the processor's outputs for the prompt, which contain the size of a Qwen-VL image; None: not known.
    """
    sizes = None if inputs is None else inputs.get("image_grid_thw")
    if sizes is not None and len(sizes) == 1:
        merge = base.config.vision_config.spatial_merge_size
        frames, height, width = sizes[0].tolist()
        grid = height // merge, width // merge
        return grid if frames * grid[0] * grid[1] == visual_tokens and frames == 1 else None
    side = round(visual_tokens**0.5)
    whole = getattr(base.config, "image_seq_length", None) == visual_tokens
    return (side, side) if whole and side * side == visual_tokens else None


def seen_box(processor: Any, image: Image.Image) -> tuple[int, int, int, int] | None:
    """The square that the model sees: around the image if the processor pads, inside it if the processor crops, else None.

    Args:
        processor: the base's processor.
        image: the picture.

    Returns:
        (left, top, right, bottom) in pixels of the image. A square around the image reaches beyond it, and so has negative
        coordinates.
    """
    prepares = processor.image_processor
    tiles = hasattr(prepares, "image_grid_pinpoints")  # which the option is about, where a picture becomes several
    if getattr(prepares, "do_pad", False) and hasattr(prepares, "pad_to_square") and not tiles:
        side = max(image.size)
    elif getattr(prepares, "do_center_crop", False):
        side = min(image.size)
    else:
        return None
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


def highlight(
    image: Image.Image,
    kept: Iterable[int],
    grid: tuple[int, int],
    box: tuple[int, int, int, int] | None = None,
    min_side: int = 672,
) -> Image.Image:
    """The picture with the kept patches framed and every other patch faded.

    Args:
        image: the picture that the question is about.
        kept: indices of the kept visual tokens, row by row from the top left patch.
        grid: rows and columns of patches.
        box: the part of the picture (left, top, right, bottom) that the grid covers; None is all of it.
        min_side: smaller pictures are enlarged until the shorter side has this many pixels, or the longer one `MAX_SIDE`.

    Returns:
        A new RGB image; `image` is not modified.

    Raises:
        TwigVLMError: an index is not in the grid.
    """
    rows, columns = grid
    chosen: NDArray[np.bool_] = np.zeros(rows * columns, dtype=bool)
    for index in kept:
        if not 0 <= index < rows * columns:
            raise TwigVLMError(
                f"kept index {index}: must be 0 to {rows * columns - 1} in a grid of {rows}x{columns} patches"
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


def side_by_side(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures of equal size in rows of three, each above its caption.

    Args:
        pictures: at least one.
        captions: one for each picture.

    Returns:
        A new image. Pictures are scaled down where a side would be longer than `MAX_SIDE`.
    """
    columns = min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    scale = min(1.0, 0.9 * MAX_SIDE / (columns * width), 0.8 * MAX_SIDE / (rows * height))
    if scale < 1:
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        pictures = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    size = max(16, min(width, height) // 32)
    font = ImageFont.load_default(size)
    wrapped = [_wrapped(caption, font, width - size) for caption in captions]
    strip = round(1.5 * size * (max(caption.count("\n") for caption in wrapped) + 1)) + size
    gap = size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + strip)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, wrapped, strict=True)):
        left, top = index % columns * (width + gap), index // columns * (height + strip)
        sheet.paste(picture, (left, top))
        draw.multiline_text(
            (left + gap // 2, top + height + gap // 2), caption, fill="black", font=font, spacing=size // 3
        )
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text with line breaks, so that no line is wider than `width` pixels if its words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _frame(
    draw: ImageDraw.ImageDraw,
    chosen: NDArray[np.bool_],
    xs: list[int],
    ys: list[int],
    width: int,
) -> None:
    """Draw a line between kept patches and patches that are not kept, or the border of the grid."""
    padded = np.pad(chosen, 1)
    for row, column in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]).tolist():
        draw.line([(xs[column], ys[row]), (xs[column + 1], ys[row])], fill=FRAME, width=width)
    for row, column in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]).tolist():
        draw.line([(xs[column], ys[row]), (xs[column], ys[row + 1])], fill=FRAME, width=width)
