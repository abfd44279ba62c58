"""Synthetic scenes: (split, index) -> the same picture on every machine.

A scene is first a description (what is where), from which come the picture (`pictures.py`), the labels of its
14-pixel patches (`patch_labels`) and, in `questions.py`, conversations about it.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SIZE, PATCH = 336, 14
GRID = SIZE // PATCH
SPLITS = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True)
class Kind:
    """A kind of thing, from a line of kinds.txt."""

    emoji: str
    name: str
    plural: str

    @property
    def with_article(self) -> str:
        """The name in the singular with its article."""
        an = self.name[0] in "aeio" or self.name in ("umbrella", "hourglass")
        return f"{'an' if an else 'a'} {self.name}"


def _kinds() -> tuple[Kind, ...]:
    kinds = []
    for line in (HERE / "kinds.txt").read_text(encoding="utf8").splitlines():
        emoji, name, *plural = line.split()
        kinds.append(Kind(emoji, name, plural[0] if plural else name + "s"))
    return tuple(kinds)


KINDS = _kinds()
WORDS = tuple((HERE / "words.txt").read_text().split())
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SIGN_COLOURS = {  # name: (board, ink)
    "red": ((205, 35, 40), (255, 255, 255)),
    "blue": ((30, 70, 190), (255, 255, 255)),
    "green": ((25, 130, 60), (255, 255, 255)),
    "yellow": ((250, 215, 40), (20, 20, 20)),
    "black": ((25, 25, 28), (245, 245, 245)),
    "white": ((248, 248, 246), (25, 25, 25)),
    "orange": ((245, 130, 20), (20, 20, 20)),
    "purple": ((115, 40, 150), (255, 255, 255)),
}
BACKGROUNDS = {
    "blue": (150, 190, 235),
    "green": (160, 215, 155),
    "pink": (245, 185, 205),
    "yellow": (245, 235, 170),
    "gray": (170, 172, 176),
    "brown": (190, 150, 115),
    "purple": (195, 170, 225),
    "white": (240, 240, 240),
}
COLOURS = tuple(sorted({*SIGN_COLOURS, *BACKGROUNDS}))
LOOK_ALIKES = 0.2  # share of things drawn from the lines below the last thing's in kinds.txt, where its look-alikes are
TEXTURES = ("plain", "striped", "dotted", "checked", "speckled")
FONTS = (
    *("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol", "cmss10", "DejaVuSans"),
    *("DejaVuSansMono", "DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "STIXGeneralBolIta", "cmb10", "cmtt10"),
)


def held_out_word(word: str) -> bool:
    """Sign words that never occur in training."""
    return word in WORDS and zlib.crc32(word.encode()) % 10 == 0


def held_out_pair(a: int, b: int) -> bool:
    """Pairs of kinds that never share a picture in training."""
    return a != b and zlib.crc32(f"{min(a, b)},{max(a, b)}".encode()) % 20 == 0


@dataclass(frozen=True)
class Thing:
    """A thing in a scene: index of its kind, centre and size in pixels, and angle in degrees."""

    kind: int
    x: float
    y: float
    size: float
    angle: float
    flip: bool
    brightness: float


@dataclass(frozen=True)
class Sign:
    """A sign in a scene: its text, centre, and distance between characters (`pitch`), in pixels."""

    text: str
    colour: str
    x: float
    y: float
    pitch: float
    font: str

    @property
    def half(self) -> tuple[float, float]:
        """Half of its width and of its height, in pixels."""
        return (len(self.text) * self.pitch / 2 + 8, self.pitch * 0.95 + 4)

    @property
    def character_centres(self) -> list[tuple[float, float]]:
        """Where its characters are centred, in pixels."""
        first = self.x - (len(self.text) - 1) * self.pitch / 2
        return [(first + i * self.pitch, self.y) for i in range(len(self.text))]


@dataclass(frozen=True)
class Scene:
    """What a picture shows, square, with sides of `size` pixels."""

    split: str
    index: int
    size: int
    background: str
    texture: str
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]


def scene_rng(split: str, index: int, purpose: int) -> np.random.Generator:
    """The random generator of a scene; what is drawn for one purpose does not depend on other purposes."""
    return np.random.default_rng([SPLITS[split], index, purpose])


def _sign_text(rng: np.random.Generator, split: str, random_text: float) -> str:
    draw = rng.random()
    if split == "train" and draw < random_text:
        return "".join(rng.choice(list(CHARACTERS), rng.integers(2, 7)))
    if draw > 0.8:
        return str(rng.integers(1, 10 ** rng.integers(1, 4)))
    while True:
        word = str(rng.choice(WORDS))
        if split == "test" or not held_out_word(word):
            return word


class _Room:
    """What is taken up of a scene."""

    def __init__(self) -> None:
        self.boxes: list[tuple[float, float, float, float]] = []

    def takes(self, x: float, y: float, half_x: float, half_y: float, overlap: float) -> bool:
        """Whether a box finds a place, which it takes up then."""
        free = all(
            abs(x - bx) > overlap * (half_x + bhx) or abs(y - by) > overlap * (half_y + bhy)
            for bx, by, bhx, bhy in self.boxes
        )
        if free:
            self.boxes.append((x, y, half_x, half_y))
        return free


def make_scene(split: str, index: int, size: int = SIZE, random_text: float = 0.4) -> Scene:
    """The scene `index` of a split.

    `size` below 336 gives a small scene of one to three things or a sign, which may stick out of the picture, for dense
    supervision; `random_text` is the share of random strings among the signs of the training split.
    """
    rng = scene_rng(split, index, purpose=size)
    room = _Room()
    signs = _signs(rng, split, size, random_text, room)
    things = _things(rng, split, size, bool(signs), room)
    return Scene(
        split, index, size, str(rng.choice(list(BACKGROUNDS))), str(rng.choice(TEXTURES)), tuple(things), tuple(signs)
    )


def _signs(rng: np.random.Generator, split: str, size: int, random_text: float, room: _Room) -> list[Sign]:
    whole = size == SIZE
    signs: list[Sign] = []
    wanted = rng.choice(4, p=(0.15, 0.4, 0.3, 0.15)) if whole else int(rng.random() < 0.7)
    for _ in range(8 * wanted):
        if len(signs) == wanted:
            break
        sign = Sign(
            text=_sign_text(rng, split, random_text),
            colour=str(rng.choice(list(SIGN_COLOURS))),
            x=rng.uniform(0, size),
            y=rng.uniform(16, size - 16),
            pitch=rng.uniform(15, 23),
            font=str(rng.choice(FONTS)),
        )
        half_x, half_y = sign.half
        inside = not whole or (half_x < sign.x < size - half_x and half_y < sign.y < size - half_y)
        if inside and room.takes(sign.x, sign.y, half_x, half_y, 1.0):
            signs.append(sign)
    return signs


def _things(rng: np.random.Generator, split: str, size: int, beside_signs: bool, room: _Room) -> list[Thing]:
    whole = size == SIZE
    things: list[Thing] = []
    wanted = rng.integers(1, 9) if whole else rng.integers(0 if beside_signs else 1, 4)
    repeated = int(rng.integers(len(KINDS))) if whole and rng.random() < 0.35 else None
    for _ in range(8 * wanted):
        if len(things) == wanted:
            break
        extent = rng.uniform(40, 120)
        margin = extent / 2 if whole else 4
        x, y = rng.uniform(margin, size - margin, 2)
        kind = int(rng.integers(len(KINDS)))
        if repeated is not None and rng.random() < 0.5:
            kind = repeated
        elif things and rng.random() < LOOK_ALIKES:
            kind = (things[-1].kind + int(rng.integers(1, 5))) % len(KINDS)
        taken = {thing.kind for thing in things}
        if kind in taken and kind != repeated:
            continue
        if split == "train" and any(held_out_pair(kind, other) for other in taken):
            continue
        if sum(thing.kind == kind for thing in things) == 5:
            continue
        if room.takes(x, y, extent / 2, extent / 2, 0.8):
            angle = float(np.clip(rng.normal(0, 12), -30, 30))
            things.append(Thing(kind, x, y, extent, angle, bool(rng.random() < 0.5), rng.uniform(0.8, 1.15)))
    return things


@dataclass(frozen=True)
class PatchLabels:
    """What each 14-pixel patch shows; every array is (rows, columns)."""

    kind: np.ndarray
    """0 nothing, 1..len(KINDS) a thing, len(KINDS) + 1 a sign."""
    centre: np.ndarray
    """How near the patch is to the centre of its thing: 1 at the centre, about 0.25 one patch away."""
    colour: np.ndarray
    """Index into COLOURS of the sign or of the background; -1 on things."""
    character: np.ndarray
    """0 none, else 1 + index into CHARACTERS of the character whose centre is in the patch."""


SIGN_KIND = len(KINDS) + 1


def patch_labels(scene: Scene) -> PatchLabels:
    """Dense supervision from geometry alone, so that scenes nobody renders have labels too."""
    grid = scene.size // PATCH
    middle = (np.arange(grid) + 0.5) * PATCH
    px, py = np.meshgrid(middle, middle)
    kind = np.zeros((grid, grid), np.int64)
    centre = np.zeros((grid, grid), np.float32)
    colour = np.full((grid, grid), COLOURS.index(scene.background))
    character = np.zeros((grid, grid), np.int64)
    for sign in scene.signs:
        half_x, half_y = sign.half
        inside = (abs(px - sign.x) < half_x) & (abs(py - sign.y) < half_y)
        kind[inside], colour[inside] = SIGN_KIND, COLOURS.index(sign.colour)
        for letter, (x, y) in zip(sign.text, sign.character_centres, strict=True):
            row, column = int(y // PATCH), int(x // PATCH)
            if 0 <= row < grid and 0 <= column < grid:
                character[row, column] = 1 + CHARACTERS.index(letter)
    for thing in scene.things:
        squared = (px - thing.x) ** 2 + (py - thing.y) ** 2
        inside = squared < (0.42 * thing.size) ** 2
        kind[inside], colour[inside], character[inside] = thing.kind + 1, -1, 0
        centre[inside] = np.exp(-squared[inside] / (2 * (0.6 * PATCH) ** 2))
    return PatchLabels(kind, centre, colour, character)
