"""Questions about a scene and their answers, which follow from the scene alone."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from recipes.sapling.scenes import KINDS, SIZE, Scene, Sign, Thing, held_out_pair, held_out_word
from recipes.sapling.wording import ASK

PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
MARGIN = 10  # pixels between a thing's centre and the border of its ninth of the picture
NUMBERS = ("no", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Turn:
    """A question about a scene, and its right answer."""

    kind: str
    question: str
    answer: str
    held_out: bool = False
    """The answer turns on a sign word or a pair of things that training never shows."""


def place(x: float, y: float) -> str:
    """Name of the ninth of the picture that a point is in, by its pixel coordinates."""
    return PLACES[min(int(3 * y / SIZE), 2)][min(int(3 * x / SIZE), 2)]


def at(name: str) -> str:
    """The name of a ninth of the picture with its preposition."""
    if name in ("left", "right"):
        return f"on the {name}"
    return f"{'at' if name in ('top', 'bottom') else 'in'} the {name}"


def _clear(thing: Thing | Sign) -> bool:
    third = SIZE / 3
    return all(min(abs(v - third), abs(v - 2 * third)) > MARGIN for v in (thing.x, thing.y))


def thing_name(thing: Thing) -> str:
    """The name of a thing, in the singular."""
    return KINDS[thing.kind].name


def _a_sign(sign: Sign) -> str:
    return f"{'an' if sign.colour == 'orange' else 'a'} {sign.colour} sign"


def short_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Every short question that has one clear answer in this scene, in random order."""
    counts = Counter(thing.kind for thing in scene.things)
    single = [thing for thing in scene.things if counts[thing.kind] == 1]
    turns: list[Turn] = []

    def ask(kind: str, answer: str, held_out: bool = False, **words: str) -> None:
        turns.append(Turn(kind, str(rng.choice(ASK[kind])).format(**words), answer, held_out))

    occupied = Counter(place(thing.x, thing.y) for thing in (*scene.things, *scene.signs))
    for thing in scene.things:
        here = place(thing.x, thing.y)
        if _clear(thing) and occupied[here] == 1:
            ask("place", KINDS[thing.kind].with_article, at=at(here))
    for thing in single:
        if _clear(thing):
            ask("where", place(thing.x, thing.y), the=f"the {thing_name(thing)}")
    for thing in single:
        for other in single:
            dx, dy = thing.x - other.x, thing.y - other.y
            if thing is other or max(abs(dx), abs(dy)) < 45:
                continue
            held_out = held_out_pair(thing.kind, other.kind)
            words = {"the": f"the {thing_name(thing)}", "other": f"the {thing_name(other)}"}
            if abs(dx) > 1.6 * abs(dy):
                ask("relation", "right" if dx > 0 else "left", held_out, **words)
            elif abs(dy) > 1.6 * abs(dx):
                ask("relation", "below" if dy > 0 else "above", held_out, **words)
    for kind in counts:
        ask("exists", "yes", a=KINDS[kind].with_article)
        near = kind + int(rng.integers(1, 5)) * (1 if rng.random() < 0.5 else -1)
        absent = near % len(KINDS) if rng.random() < 0.5 else int(rng.integers(len(KINDS)))
        if absent not in counts:
            ask("exists", "no", a=KINDS[absent].with_article)
    for kind, count in counts.items():
        if count > 1 or rng.random() < 0.5:
            ask("count", str(count), plural=KINDS[kind].plural)
    signs = Counter(sign.colour for sign in scene.signs)
    for sign in scene.signs:
        if signs[sign.colour] == 1:
            label = "sign" if len(scene.signs) == 1 and rng.random() < 0.7 else f"{sign.colour} sign"
            ask("sign text", sign.text, held_out_word(sign.text), sign=label)
    if len(scene.signs) == 1:
        ask("sign colour", scene.signs[0].colour)
    for thing in single:
        by_distance = sorted(
            (math.dist((thing.x, thing.y), (other.x, other.y)), other.kind)
            for other in scene.things
            if other is not thing
        )
        if by_distance and (len(by_distance) == 1 or by_distance[0][0] < 0.7 * by_distance[1][0]):
            nearest = by_distance[0][1]
            held_out = held_out_pair(thing.kind, nearest)
            ask("next to", KINDS[nearest].with_article, held_out, the=f"the {thing_name(thing)}")
    return [turns[i] for i in rng.permutation(len(turns))]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def description_turn(scene: Scene, rng: np.random.Generator) -> Turn:
    """A description in one of several orders and wordings; the first words give the order away."""
    orders = {
        "from left to right": lambda thing: thing.x,
        "from top to bottom": lambda thing: thing.y,
        "from large to small": lambda thing: -thing.size,
    }
    order = str(rng.choice(list(orders)))
    things = sorted(scene.things, key=orders[order])
    counts = Counter(thing.kind for thing in things)
    groups: dict[int, list[Thing]] = {}
    for thing in things:
        groups.setdefault(thing.kind, []).append(thing)
    noun = str(rng.choice(["picture", "image", "scene"]))
    texture = "plain" if scene.texture == "plain" else scene.texture
    sentences = [
        str(rng.choice(["This {n} has a {t} {b} background.", "The background of the {n} is {t} and {b}."])).format(
            n=noun, t=texture, b=scene.background
        )
    ]
    wording = int(rng.integers(3))
    opening = f"{order[0].upper()}{order[1:]}, " if things else ""
    listed = []
    for kind, members in groups.items():
        where = _join([at(place(member.x, member.y)) for member in members])
        many = counts[kind]
        what = KINDS[kind].with_article if many == 1 else f"{NUMBERS[many]} {KINDS[kind].plural}"
        listed.append(f"{what} {where}")
    if wording == 1 and listed:
        sentences.append(f"{opening}you can see {_join(listed)}.")
    elif wording == 2 and listed:
        sentences.append(f"{opening}it shows {'; '.join(listed)}.")
    elif listed:
        verb = "there are" if len(listed) > 1 or max(counts.values()) > 1 else "there is"
        sentences.append(f"{opening}{verb} {_join(listed)}.")
    for sign in scene.signs:
        shows = str(rng.choice(["reads", "says"]))
        opening = _a_sign(sign).capitalize()
        sentences.append(f"{opening} {at(place(sign.x, sign.y))} {shows} {sign.text}.")
    if not scene.signs:
        sentences.append("No sign can be seen.")
    total = len(things)
    objects = "object" if total == 1 else "objects"
    sentences.append(f"In total the {noun} shows {total} {objects}.")
    return Turn("description", str(rng.choice(ASK["description"])), " ".join(sentences))


def long_turns(scene: Scene, short: list[Turn], rng: np.random.Generator) -> list[Turn]:
    """One question of every long kind, other than a description, that has one clear answer in this scene."""
    turns: list[Turn] = []

    def ask(kind: str, answer: str, held_out: bool = False, **words: str) -> None:
        turns.append(Turn(kind, str(rng.choice(ASK[kind])).format(**words), answer, held_out))

    def named(member: Thing | Sign) -> str:
        return _a_sign(member) if isinstance(member, Sign) else KINDS[member.kind].with_article

    def listed(members: list[Thing | Sign]) -> str:
        return _join([named(member) for member in sorted(members, key=lambda member: member.x)] or ["nothing"])

    def ordered(members: list[Thing | Sign], along: str) -> bool:
        places = sorted(getattr(member, along) for member in members)
        return all(b - a > MARGIN for a, b in itertools.pairwise(places))

    order, along = [("left to right", "x"), ("top to bottom", "y")][rng.integers(2)]
    signs = sorted(scene.signs, key=lambda sign: getattr(sign, along))
    if signs and ordered(signs, along):
        verb = "The sign says" if len(signs) == 1 else "The signs say"
        held_out = any(held_out_word(sign.text) for sign in signs)
        ask("all signs", f"{verb} {_join([sign.text for sign in signs])}.", held_out, order=order)

    everything = [*scene.things, *scene.signs]
    rows = [[member for member in everything if int(3 * member.y / SIZE) == row] for row in range(3)]
    borders = (SIZE / 3, 2 * SIZE / 3)
    if all(ordered(row, "x") for row in rows) and all(
        abs(member.y - border) > MARGIN for member in everything for border in borders
    ):
        names = ("Top", "Middle", "Bottom")
        ask("rows", " ".join(f"{name}: {listed(row)}." for name, row in zip(names, rows, strict=True)))

    first, second, along = [("left", "right", "x"), ("top", "bottom", "y")][rng.integers(2)]
    halves = [[member for member in everything if int(2 * getattr(member, along) / SIZE) == half] for half in range(2)]
    if all(ordered(half, "x") for half in halves) and all(
        abs(getattr(member, along) - SIZE / 2) > MARGIN for member in everything
    ):
        more = len(halves[0]) - len(halves[1])
        verdict = f"The {first if more > 0 else second} half shows more." if more else "Both halves show as much."
        parts = (f"The {name} half shows {listed(half)}." for name, half in zip((first, second), halves, strict=True))
        ask("halves", f"{' '.join(parts)} {verdict}", first=first, second=second)

    if len(short) >= 3:
        three = [short[i] for i in rng.permutation(len(short))[:3]]
        questions = " ".join(f"{n}. {turn.question}" for n, turn in enumerate(three, 1))
        answers = " ".join(f"{n}. {turn.answer}" for n, turn in enumerate(three, 1))
        ask("three questions", answers, any(turn.held_out for turn in three), questions=questions)
    return [turns[i] for i in rng.permutation(len(turns))]
