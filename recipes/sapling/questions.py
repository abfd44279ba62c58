"""Conversations about scenes, with answers that follow from the scene alone.

    python -m recipes.sapling.questions --split train --count 2000 --output runs/train

writes LLaVA's JSON and the pictures beside it;

    python -m recipes.sapling.questions --split test --count 1000 --output runs/test --evaluation

writes short questions and descriptions with their answers for `twigvlm evaluate`.
"""

import itertools
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import tyro

from recipes.sapling.pictures import render
from recipes.sapling.scenes import KINDS, Scene, make_scene, scene_rng
from recipes.sapling.turns import Turn, description_turn, long_turns, short_turns, thing_name
from twigvlm.cli.output import steps

SHORT_KINDS = ("place", "where", "relation", "exists", "count", "sign text", "sign colour", "next to")
LONG_KINDS = ("description", "all signs", "rows", "halves", "three questions")


def conversation(scene: Scene, count: int = 12) -> list[Turn]:
    """Up to `count` short turns, rarer kinds first served, one description, and one turn of another long kind."""
    rng = scene_rng(scene.split, scene.index, purpose=7)
    short = short_turns(scene, rng)
    chosen = _balanced(short, count)
    for turn in [description_turn(scene, rng), *long_turns(scene, short, rng)[:1]]:
        chosen.insert(int(rng.integers(len(chosen) + 1)), turn)
    return chosen


def evaluation_turns(scene: Scene, short: int) -> list[Turn]:
    """Up to `short` short turns, rarer kinds first served, then one of every long kind that this scene allows."""
    rng = scene_rng(scene.split, scene.index, purpose=7)
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
                    row["objects"] = sorted({thing_name(thing) for thing in scene.things})
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
