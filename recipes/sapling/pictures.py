"""The picture of a scene."""

import math
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from recipes.sapling.scenes import BACKGROUNDS, HERE, SIGN_COLOURS, SIZE, Scene, scene_rng

ATLASES = {"noto": HERE / "atlas.webp", "emojione": HERE / "atlas_emojione.webp"}
"""Sprites by style; training sees the first alone. In the others, kinds that their font lacks are empty cells."""
ATLAS_COLUMNS, CELL = 15, 96


@cache
def _atlas(style: str) -> Image.Image:
    return Image.open(ATLASES[style]).convert("RGBA")


@cache
def _sprite(kind: int, style: str) -> Image.Image:
    column, row = kind % ATLAS_COLUMNS * CELL, kind // ATLAS_COLUMNS * CELL
    return _atlas(style).crop((column, row, column + CELL, row + CELL))


def drawable(scene: Scene, style: str) -> bool:
    """Whether a style has a sprite of everything in the scene."""
    return all(_sprite(thing.kind, style).getbbox() for thing in scene.things)


@cache
def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", pixels)


def _background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    size = scene.size
    colour = np.array(BACKGROUNDS[scene.background]) + rng.uniform(-10, 10, 3)
    x, y = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
    angle = rng.uniform(0, 2 * math.pi)
    along = math.cos(angle) * x + math.sin(angle) * y
    shade = along * rng.uniform(0, 22)
    period = rng.uniform(0.06, 0.2) * SIZE / size
    if scene.texture == "striped":
        shade = shade + 14 * np.sign(np.sin(2 * math.pi * along / period))
    elif scene.texture == "checked":
        shade = shade + 10 * np.sign(np.sin(math.pi * x / period) * np.sin(math.pi * y / period))
    elif scene.texture == "dotted":
        shade = shade - 22 * (np.sin(math.pi * x / period) ** 2 + np.sin(math.pi * y / period) ** 2 > 1.6)
    elif scene.texture == "speckled":
        shade = shade + rng.normal(0, 14, (size, size))
    pixels = np.clip(colour + shade[..., None], 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 10) * size // SIZE + 1):
        clutter = tuple(int(v) for v in np.clip(colour + rng.uniform(-60, 60, 3), 0, 255))
        cx, cy, reach = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(4, 22)
        corners = rng.uniform(-reach, reach, (3, 2)) + np.array([cx, cy])
        shape = rng.integers(3)
        if shape == 0:
            draw.polygon([tuple(corner) for corner in corners], fill=clutter)
        elif shape == 1:
            draw.ellipse((cx - reach / 2, cy - reach / 2, cx + reach / 2, cy + reach / 2), fill=clutter)
        else:
            draw.line([tuple(corner) for corner in corners[:2]], fill=clutter, width=int(rng.integers(1, 5)))
    return image


def render(scene: Scene, style: str = "noto") -> Image.Image:
    """The picture of a scene, RGB, size × size pixels, with the sprites of one of `ATLASES`."""
    rng = scene_rng(scene.split, scene.index, purpose=scene.size + 1)
    image = _background(scene, rng)
    draw = ImageDraw.Draw(image)
    for sign in scene.signs:
        board, ink = SIGN_COLOURS[sign.colour]
        board = tuple(int(v) for v in np.clip(np.array(board) + rng.uniform(-12, 12, 3), 0, 255))
        half_x, half_y = sign.half
        box = (sign.x - half_x, sign.y - half_y, sign.x + half_x, sign.y + half_y)
        draw.rounded_rectangle(box, radius=5, fill=board, outline=ink, width=2)
        font = _font(sign.font, round(sign.pitch * 1.25))
        for character, centre in zip(sign.text, sign.character_centres, strict=True):
            draw.text(centre, character, fill=ink, font=font, anchor="mm")
    for thing in scene.things:
        extent = round(thing.size)
        sprite = _sprite(thing.kind, style).resize((extent, extent), Image.Resampling.BICUBIC)
        if thing.flip:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        sprite = sprite.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
        alpha = sprite.getchannel("A")
        bright = ImageEnhance.Brightness(sprite.convert("RGB")).enhance(thing.brightness)
        image.paste(bright, (round(thing.x - sprite.width / 2), round(thing.y - sprite.height / 2)), alpha)
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    return image
