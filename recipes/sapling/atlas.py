"""Render the sprite atlas once: one cell per line of kinds.txt, from Noto Color Emoji (OFL-1.1).

python -m recipes.sapling.atlas NotoColorEmoji.ttf
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from recipes.sapling.scenes import ATLAS, ATLAS_COLUMNS, CELL, KINDS

STRIKE = 109  # the only size at which the font's bitmaps exist


def build(font_file: str) -> Image.Image:
    font = ImageFont.truetype(font_file, STRIKE)
    rows = -(-len(KINDS) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * CELL, rows * CELL))
    for index, kind in enumerate(KINDS):
        sprite = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(sprite).text((12, 12), kind.emoji, font=font, embedded_color=True)
        sprite = sprite.crop(sprite.getbbox())
        sprite.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        column, row = index % ATLAS_COLUMNS, index // ATLAS_COLUMNS
        corner = (column * CELL + (CELL - sprite.width) // 2, row * CELL + (CELL - sprite.height) // 2)
        atlas.alpha_composite(sprite, corner)
    return atlas


if __name__ == "__main__":
    build(sys.argv[1]).save(Path(ATLAS), quality=92, method=6)
