"""Scenes and their conversations: the same everywhere, honest splits, answers that follow from the picture."""

import json
import re
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.sapling.pictures import _sprite, drawable, render
from recipes.sapling.questions import (
    LONG_KINDS,
    SHORT_KINDS,
    Options,
    conversation,
    evaluation_turns,
    llava_sample,
    main,
)
from recipes.sapling.scenes import (
    CHARACTERS,
    COLOURS,
    GRID,
    KINDS,
    PATCH,
    SIGN_KIND,
    SIZE,
    SPLITS,
    WORDS,
    held_out_pair,
    held_out_word,
    make_scene,
    patch_labels,
    scene_rng,
)
from recipes.sapling.turns import place, short_turns

GOLDEN = [296354140, 2315605587, 3770819286]
scenes = st.builds(make_scene, st.sampled_from(sorted(SPLITS)), st.integers(0, 10**6))


def test_there_are_at_least_200_kinds_with_names_of_their_own():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 200


def test_a_scene_is_a_function_of_split_and_index():
    first, again = make_scene("train", 7), make_scene("train", 7)
    assert first == again
    assert np.array_equal(np.asarray(render(first)), np.asarray(render(again)))
    assert make_scene("train", 8) != first
    assert make_scene("test", 7).things != first.things
    # On every machine, or else splits, published weights and results would belong to other scenes.
    assert [zlib.crc32(repr(make_scene(split, 7)).encode()) for split in ("train", "validation", "test")] == GOLDEN


@given(scenes)
@settings(max_examples=40, deadline=None)
def test_things_lie_inside_and_training_keeps_held_out_material_apart(scene):
    assert 1 <= len(scene.things) <= 8
    for thing in scene.things:
        assert 40 <= thing.size <= 120
        assert thing.size / 2 <= thing.x <= SIZE - thing.size / 2
    if scene.split == "train":
        kinds = [thing.kind for thing in scene.things]
        assert not any(held_out_pair(a, b) for a in kinds for b in kinds)
        assert not any(held_out_word(sign.text) for sign in scene.signs)


def test_the_test_split_shows_held_out_words():
    signs = [sign.text for index in range(300) for sign in make_scene("test", index).signs]
    assert any(held_out_word(text) for text in signs)
    assert 0.03 < np.mean([held_out_word(word) for word in WORDS]) < 0.25


@given(scenes)
@settings(max_examples=20, deadline=None)
def test_labels_name_what_is_painted(scene):
    labels = patch_labels(scene)
    assert labels.kind.shape == (GRID, GRID)
    last = scene.things[-1]
    row, column = int(last.y // PATCH), int(last.x // PATCH)
    assert labels.kind[row, column] == last.kind + 1
    assert labels.centre[row, column] > 0.2
    assert (labels.colour[labels.kind == 0] == COLOURS.index(scene.background)).all()
    assert set(np.unique(labels.kind)) <= {0, SIGN_KIND} | {thing.kind + 1 for thing in scene.things}


def test_a_sign_is_labelled_letter_by_letter_along_one_row():
    scene = next(
        scene
        for scene in (make_scene("validation", index) for index in range(500))
        if len(scene.signs) == 1 and not any(abs(thing.y - scene.signs[0].y) < 90 for thing in scene.things)
    )
    rows, columns = np.nonzero(patch_labels(scene).character)
    assert len(set(rows)) == 1
    read = "".join(CHARACTERS[c - 1] for c in patch_labels(scene).character[rows[0], columns])
    assert read == scene.signs[0].text


@pytest.mark.parametrize(
    ("x", "y", "name"), [(10, 10, "top left"), (168, 168, "center"), (330, 168, "right"), (168, 330, "bottom")]
)
def test_places(x, y, name):
    assert place(x, y) == name


@given(scenes)
@settings(max_examples=40, deadline=None)
def test_answers_follow_from_the_scene(scene):
    present = {KINDS[thing.kind].name: thing for thing in scene.things}
    for turn in short_turns(scene, np.random.default_rng(0)):
        asked = [name for name in present if f" {name}" in turn.question]
        if turn.kind == "where":
            name = max(asked, key=len)
            assert turn.answer == place(present[name].x, present[name].y)
        if turn.kind in ("place", "next to"):
            assert turn.answer.split()[1] in present
        if turn.kind == "exists" and turn.answer == "yes":
            assert asked
        if turn.kind == "sign text":
            assert turn.answer in {sign.text for sign in scene.signs}


def test_yes_and_no_are_balanced_and_every_kind_is_asked():
    turns = [turn for index in range(150) for turn in conversation(make_scene("train", index), 99)]
    answers = [turn.answer for turn in turns if turn.kind == "exists"]
    assert 0.4 < np.mean([answer == "yes" for answer in answers]) < 0.6
    assert {turn.kind for turn in turns} == {*SHORT_KINDS, *LONG_KINDS}


@given(scenes)
@settings(max_examples=60, deadline=None)
def test_long_answers_follow_from_the_scene(scene):
    everything = [*scene.things, *scene.signs]
    for turn in evaluation_turns(scene, 0):
        if turn.kind == "all signs":
            along = "x" if "left to right" in turn.question else "y"
            texts = [sign.text for sign in sorted(scene.signs, key=lambda sign: getattr(sign, along))]
            assert re.findall(r"\b[A-Z0-9]+\b", turn.answer) == texts
            assert turn.held_out == any(held_out_word(text) for text in texts)
        if turn.kind in ("rows", "halves"):
            named = re.findall(r"\b(?:an?) ([a-z]+)", turn.answer)
            assert len(named) == len(everything)
        if turn.kind == "rows":
            for row, listed in enumerate(re.split("Top: |Middle: |Bottom: ", turn.answer)[1:]):
                there = [member for member in everything if int(3 * member.y / SIZE) == row]
                assert len(re.findall(r"\ban? ", listed)) == len(there)
                assert ("nothing" in listed) == (not there)
        if turn.kind == "halves":
            first, second = turn.answer.split(". ")[:2]
            along = "x" if first.startswith("The left") else "y"
            counts = [sum(int(2 * getattr(member, along) / SIZE) == half for member in everything) for half in (0, 1)]
            assert [len(re.findall(r"\ban? ", half)) for half in (first, second)] == counts
            assert ("Both halves" in turn.answer) == (counts[0] == counts[1])
        if turn.kind == "three questions":
            short = {
                (one.question, one.answer) for one in short_turns(scene, scene_rng(scene.split, scene.index, purpose=7))
            }
            asked = re.split(r"\b[123]\. ", turn.question)[1:]
            given = re.split(r"\b[123]\. ", turn.answer)[1:]
            assert {(a.strip(), b.strip()) for a, b in zip(asked, given, strict=True)} <= short


def test_a_second_style_draws_the_same_scene_with_other_sprites():
    scene = next(
        scene
        for scene in (make_scene("test", index) for index in range(99))
        if drawable(scene, "emojione") and scene.signs
    )
    noto, other = (np.asarray(render(scene, style)).astype(int) for style in ("noto", "emojione"))
    thing = scene.things[0]
    changed = np.abs(noto - other).max(-1) > 0
    assert changed[round(thing.y) - 9 : round(thing.y) + 9, round(thing.x) - 9 : round(thing.x) + 9].mean() > 0.5
    assert changed.mean() < 0.8
    lacking = [kind for kind in range(len(KINDS)) if not _sprite(kind, "emojione").getbbox()]
    assert 0 < len(lacking) <= 15
    assert all(_sprite(kind, "noto").getbbox() for kind in range(len(KINDS)))


def test_a_sample_is_llava_json():
    sample = llava_sample(make_scene("train", 3), "3.jpg")
    messages = sample["conversations"]
    assert messages[0]["value"].startswith("<image>\n")
    assert [message["from"] for message in messages] == ["human", "gpt"] * (len(messages) // 2)
    assert sum("<image>" in message["value"] for message in messages) == 1


@pytest.mark.parametrize("evaluation", [False, True])
def test_writing_them_shows_progress(tmp_path, capsys, evaluation):
    main(Options(tmp_path, "validation", count=3, evaluation=evaluation, descriptions=2))
    written = json.loads((tmp_path / ("questions.json" if evaluation else "conversations.json")).read_text())
    done = len(written["questions"] if evaluation else written)
    assert done == (5 if evaluation else 3)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{done}/{done} Writing ")
