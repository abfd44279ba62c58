"""Render the sprite atlases once: one cell per line of kinds.txt.

    python -m recipes.sapling.atlas noto NotoColorEmoji.ttf
    python -m recipes.sapling.atlas emojione folder/of/png

The first style is Noto Color Emoji (OFL-1.1), a font; the second is EmojiOne (CC-BY-SA-4.0), pictures named by code point, from
Debian's package ruby-gemojione.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from recipes.sapling.pictures import ATLAS_COLUMNS, ATLASES, CELL
from recipes.sapling.scenes import KINDS, Kind

STRIKE = 109  # the only size at which the font's bitmaps exist


def from_font(kind: Kind, font_file: Path) -> Image.Image:
    """The glyph of a kind in a font of bitmaps."""
    sprite = Image.new("RGBA", (160, 160))
    font = ImageFont.truetype(font_file, STRIKE)
    ImageDraw.Draw(sprite).text((12, 12), kind.emoji, font=font, embedded_color=True)
    return sprite


def from_pictures(kind: Kind, folder: Path) -> Image.Image | None:
    """The picture of a kind; None where the folder has none."""
    code_point = "-".join(f"{ord(character):04X}" for character in kind.emoji if character != "\ufe0f")
    picture = folder / f"{code_point}.png"
    return Image.open(picture).convert("RGBA") if picture.exists() else None


def build(style: str, source: Path) -> Image.Image:
    """The atlas of a style, from a font file or a folder of pictures; kinds without a picture stay empty."""
    rows = -(-len(KINDS) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * CELL, rows * CELL))
    draw = from_font if style == "noto" else from_pictures
    for index, kind in enumerate(KINDS):
        sprite = draw(kind, source)
        if sprite is None:
            continue
        sprite = sprite.crop(sprite.getbbox())
        scale = CELL / max(sprite.size)
        size = (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale)))
        sprite = sprite.resize(size, Image.Resampling.LANCZOS)
        column, row = index % ATLAS_COLUMNS, index // ATLAS_COLUMNS
        corner = (column * CELL + (CELL - sprite.width) // 2, row * CELL + (CELL - sprite.height) // 2)
        atlas.alpha_composite(sprite, corner)
    return atlas


if __name__ == "__main__":
    style, source = sys.argv[1:]
    build(style, Path(source)).save(ATLASES[style], quality=92, method=6)
