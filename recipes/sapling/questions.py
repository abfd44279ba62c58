"""Conversations about scenes, with answers that follow from the scene alone.

    python -m recipes.sapling.questions --split train --count 2000 --output runs/train

writes LLaVA's JSON and the pictures beside it;

    python -m recipes.sapling.questions --split test --count 1000 --output runs/test --evaluation

writes short questions and descriptions with their answers for `twigvlm evaluate`.
"""

import itertools
import json
import math
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from recipes.sapling.scenes import (
    KINDS,
    SIZE,
    Scene,
    Sign,
    Thing,
    _rng,
    held_out_pair,
    held_out_word,
    make_scene,
    render,
)
from twigvlm.cli.output import steps

PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
MARGIN = 10  # pixels between a thing's centre and the border of its ninth of the picture
NUMBERS = ("no", "one", "two", "three", "four", "five")
SHORT_KINDS = ("place", "where", "relation", "exists", "count", "sign text", "sign colour", "next to")
LONG_KINDS = ("description", "all signs", "rows", "halves", "three questions")

ASK = {
    "place": (
        "What is {at}?",
        "What can be seen {at}?",
        "Name the object {at}.",
        "Which object is {at}?",
        "What object do you see {at} of the picture?",
        "Tell me what is {at}.",
        "VisualQuery {at}: what is there?",
        "What is shown {at} of the image?",
    ),
    "where": (
        "Where is {the}?",
        "Where can I find {the}?",
        "In which part of the picture is {the}?",
        "Tell me where {the} is.",
        "Where do you see {the}?",
        "What is the position of {the}?",
        "In what area of the image is {the}?",
        "Point me to {the}.",
    ),
    "relation": (
        "Where is {the} relative to {other}?",
        "Is {the} left of, right of, above or below {other}?",
        "On which side of {other} is {the}?",
        "How is {the} placed with respect to {other}?",
        "Seen from {other}, where is {the}?",
        "In which direction from {other} is {the}?",
        "Compared with {other}, where is {the}?",
        "What is the position of {the} relative to {other}?",
    ),
    "exists": (
        "Is there {a} in the picture?",
        "Do you see {a}?",
        "Can you find {a} here?",
        "Does the image show {a}?",
        "Is {a} visible?",
        "Does this picture contain {a}?",
        "Is there {a} anywhere?",
        "Can {a} be seen in this image?",
    ),
    "count": (
        "How many {plural} are there?",
        "How many {plural} do you see?",
        "Count the {plural}.",
        "What is the number of {plural}?",
        "How many {plural} does the picture show?",
        "How many {plural} can you find?",
        "Tell me how many {plural} there are.",
        "How many {plural} are in the image?",
    ),
    "sign text": (
        "What does the {sign} say?",
        "What is written on the {sign}?",
        "Read the {sign}.",
        "What is the text on the {sign}?",
        "Which text is on the {sign}?",
        "What can be read on the {sign}?",
        "Tell me what the {sign} says.",
        "What stands on the {sign}?",
    ),
    "sign colour": (
        "What color is the sign?",
        "Which color does the sign have?",
        "What is the color of the sign?",
        "Name the color of the sign.",
        "The sign is of which color?",
        "Tell me the color of the sign.",
        "In what color is the sign painted?",
        "What color has the sign?",
    ),
    "next to": (
        "What is next to {the}?",
        "Which object is closest to {the}?",
        "What is near {the}?",
        "What stands beside {the}?",
        "Name the object nearest to {the}.",
        "What do you see next to {the}?",
        "Which object is beside {the}?",
        "What is the nearest neighbor of {the}?",
    ),
    "description": (
        "Describe the picture.",
        "Describe this image in detail.",
        "What do you see in this picture?",
        "Give a full description of the image.",
        "Tell me everything about this picture.",
        "What is shown here? Describe it.",
        "Please describe the scene.",
        "Write a description of this image.",
    ),
    "all signs": (
        "Read all signs from {order}.",
        "What do the signs say, from {order}?",
        "List the text of every sign from {order}.",
        "From {order}, what is written on the signs?",
    ),
    "rows": (
        "List everything row by row.",
        "What is in each row of the picture?",
        "Go through the picture row by row.",
        "Name what you see, one row after another.",
    ),
    "halves": (
        "Compare the {first} half with the {second} half.",
        "How do the {first} half and the {second} half differ?",
        "What is in the {first} half, and what in the {second} half?",
        "Tell me what the {first} and the {second} half show.",
    ),
    "three questions": (
        "Answer three questions. {questions}",
        "Please answer these questions. {questions}",
        "I have three questions. {questions}",
        "Three questions about the picture: {questions}",
    ),
}


@dataclass(frozen=True)
class Turn:
    kind: str
    question: str
    answer: str
    held_out: bool = False
    """The answer turns on a sign word or a pair of things that training never shows."""


def place(x: float, y: float) -> str:
    return PLACES[min(int(3 * y / SIZE), 2)][min(int(3 * x / SIZE), 2)]


def at(name: str) -> str:
    if name in ("left", "right"):
        return f"on the {name}"
    return f"{'at' if name in ('top', 'bottom') else 'in'} the {name}"


def _clear(thing: Thing | Sign) -> bool:
    third = SIZE / 3
    return all(min(abs(v - third), abs(v - 2 * third)) > MARGIN for v in (thing.x, thing.y))


def _name(thing: Thing) -> str:
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
            ask("where", place(thing.x, thing.y), the=f"the {_name(thing)}")
    for thing in single:
        for other in single:
            dx, dy = thing.x - other.x, thing.y - other.y
            if thing is other or max(abs(dx), abs(dy)) < 45:
                continue
            held_out = held_out_pair(thing.kind, other.kind)
            words = {"the": f"the {_name(thing)}", "other": f"the {_name(other)}"}
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
            ask("next to", KINDS[nearest].with_article, held_out, the=f"the {_name(thing)}")
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


def conversation(scene: Scene, count: int = 12) -> list[Turn]:
    """Up to `count` short turns, rarer kinds first served, one description, and one turn of another long kind."""
    rng = _rng(scene.split, scene.index, purpose=7)
    short = short_turns(scene, rng)
    chosen = _balanced(short, count)
    for turn in [description_turn(scene, rng), *long_turns(scene, short, rng)[:1]]:
        chosen.insert(int(rng.integers(len(chosen) + 1)), turn)
    return chosen


def evaluation_turns(scene: Scene, short: int) -> list[Turn]:
    """Up to `short` short turns, rarer kinds first served, then one of every long kind that this scene allows."""
    rng = _rng(scene.split, scene.index, purpose=7)
    turns = short_turns(scene, rng)
    return [*_balanced(turns, short), description_turn(scene, rng), *long_turns(scene, turns, rng)]


def _balanced(turns: list[Turn], count: int) -> list[Turn]:
    by_kind: dict[str, list[Turn]] = {}
    for turn in turns:
        by_kind.setdefault(turn.kind, []).append(turn)
    chosen: list[Turn] = []
    while by_kind and len(chosen) < count:
        for kind in list(by_kind):
            chosen.append(by_kind[kind].pop())
            if not by_kind[kind]:
                del by_kind[kind]
    return chosen[:count]


def llava_sample(scene: Scene, image: str) -> dict[str, object]:
    """The scene's conversation in LLaVA's JSON format."""
    messages: list[dict[str, str]] = []
    for turn in conversation(scene):
        start = "" if messages else "<image>\n"
        messages += [{"from": "human", "value": start + turn.question}, {"from": "gpt", "value": turn.answer}]
    return {"id": f"{scene.split}-{scene.index:06d}", "image": image, "conversations": messages}


def write_sample(folder: Path, split: str, index: int) -> dict[str, object]:
    """Write a scene's picture; its conversation."""
    scene = make_scene(split, index)
    name = f"{split}-{index:06d}.jpg"
    render(scene).save(folder / name, quality=92)
    return llava_sample(scene, name)


def evaluation_file(folder: Path, options: "Options") -> None:
    """Questions with answers for `twigvlm evaluate`: short ones, descriptions and other long answers."""
    rows: list[dict[str, object]] = []
    wanted = dict.fromkeys(LONG_KINDS, options.long) | {"description": options.descriptions}
    left = Counter(wanted) + Counter(short=options.count)
    with steps("Writing questions", left.total()) as advance:
        for index in itertools.count():
            if not left.total():
                break
            scene = make_scene(options.split, index)
            chosen: list[Turn] = []
            for turn in evaluation_turns(scene, options.per_scene):
                kind = turn.kind if turn.kind in LONG_KINDS else "short"
                if left[kind]:
                    left[kind] -= 1
                    chosen.append(turn)
            picture = f"{options.split}-{index:06d}.png"
            if chosen:
                render(scene).save(folder / picture)
            for number, turn in enumerate(chosen):
                row = {"id": f"{options.split}-{index:06d}-{number}", "image": picture, **asdict(turn)}
                if turn.kind == "description":
                    row["objects"] = sorted({_name(thing) for thing in scene.things})
                    row["texts"] = [sign.text for sign in scene.signs]
                elif turn.kind in LONG_KINDS:
                    row["long"] = True
                rows.append(row)
            advance(count=len(chosen))
    vocabulary = {kind.name: sorted({kind.name, kind.plural}) for kind in KINDS}
    record = {"split": options.split, "vocabulary": vocabulary, "questions": rows}
    (folder / "questions.json").write_text(json.dumps(record, indent=1))


@dataclass
class Options:
    output: Path
    """Folder for `conversations.json` (or `questions.json`) and the pictures."""
    split: str = "train"
    count: int = 1000
    """Scenes; with `evaluation` short questions."""
    evaluation: bool = False
    """Write questions with answers for `twigvlm evaluate` instead of conversations to train on."""
    descriptions: int = 100
    """Descriptions, beside the short questions."""
    long: int = 0
    """Questions of each other kind that has a long answer."""
    per_scene: int = 4
    """Most short questions about one scene among them."""


def main(options: Options) -> None:
    if options.per_scene < 1:
        raise SystemExit(f"per_scene={options.per_scene}: must be 1 or more")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.evaluation:
        evaluation_file(options.output, options)
        return
    with ProcessPoolExecutor() as pool:
        write = partial(write_sample, options.output, options.split)
        written = pool.map(write, range(options.count), chunksize=16)  # starts its processes before any thread
        samples = []
        with steps("Writing scenes", options.count) as advance:
            for sample in written:
                samples.append(sample)
                advance()
    (options.output / "conversations.json").write_text(json.dumps(samples, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))
