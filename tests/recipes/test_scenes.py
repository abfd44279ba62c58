"""Scenes and their conversations: the same everywhere, honest splits, answers that follow from the picture."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.sapling.questions import SHORT_KINDS, Options, conversation, llava_sample, main, place, short_turns
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
    render,
)

GOLDEN = [4065503798, 3109047388, 3470575107]
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
    assert {turn.kind for turn in turns} == {*SHORT_KINDS, "description"}


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
