"""Rows are admitted by the memory that their buffers take, and wait for room otherwise."""

import itertools

import pytest
import torch

from tests.tiny import IMAGE_TOKEN, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwigVLM.grow(tiny_llava(deep_scale=0.5, from_layer=2), TwigConfig(2, 2, pruning_head=True))


def test_requests_that_came_one_by_one_keep_room_for_their_answers(model):
    engine = model.engine()
    for seed in range(6):
        engine.add(prompt(seed), max_new_tokens=40)
    engine.max_bytes = 3 * engine.waiting[0].cache_bytes.sum()
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, len(engine.active))
    assert most == 3


def test_a_long_prompt_takes_as_much_room_from_the_rows_beside_it(model):
    """Buffers are as long in every row; by their own sizes all of these would fit."""
    engine = model.engine(max_bytes=1)
    engine.runner.batch.cache.reserve = 4
    engine.add(prompt(0, before=95), max_new_tokens=4)
    for seed in range(12):
        engine.add(prompt(seed), max_new_tokens=4)
    engine.max_bytes = sum(row.cache_bytes.sum() for row in engine.waiting)
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.runner.batch.cache.allocated())
    assert most <= engine.max_bytes


def test_room_that_a_long_prompt_leaves_behind_is_counted(model):
    engine = model.engine()
    cache = engine.runner.batch.cache
    cache.reserve = 1
    long = engine.add(prompt(0, before=95), max_new_tokens=4)
    engine.add(prompt(1), max_new_tokens=20)
    engine.step()
    engine.cancel(long)
    engine.max_bytes = cache.allocated()
    for seed in range(6):
        engine.add(prompt(seed), max_new_tokens=4)
    engine.step()
    assert cache.allocated() <= engine.max_bytes


def test_a_row_that_some_layers_have_no_room_for_waits():
    """It takes the place of a row that needed more bytes in all, but fewer in the layers after the cut of its picture."""
    torch.manual_seed(0)
    model = TwigVLM.grow(tiny_llava(layers=16, side=8), TwigConfig(2, 2))
    visual, text = torch.full((1, 64), IMAGE_TOKEN), torch.arange(2, 19)[None]
    ids = torch.cat((text[:, :1], visual, text[:, :2]), dim=1)
    picture = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)}
    engine = model.engine(max_bytes=1)
    cache = engine.runner.batch.cache
    cache.reserve = 8
    for length in (3, *[7] * 9):
        engine.add(picture, keep=1, max_new_tokens=length, eos_token_id=-1)
    engine.add({"input_ids": text, "attention_mask": torch.ones_like(text)}, max_new_tokens=6, eos_token_id=-1)
    needed, there = (int(engine.waiting[index].cache_bytes.sum()) for index in (-1, 0))
    assert needed < there
    engine.max_bytes = 10 * there
    rows = []
    while engine.busy:
        engine.step()
        rows.append(len(engine.active))
        assert cache.allocated() <= engine.max_bytes
    assert max(rows) == 10


def test_a_prompt_that_is_a_little_longer_takes_a_little_more_room(model):
    def allocated(*prompts):
        engine = model.engine()
        engine.runner.batch.cache.reserve = 4
        for inputs in prompts:
            engine.add(inputs, max_new_tokens=4, eos_token_id=-1)
            engine.step()
        return engine.runner.batch.cache.allocated()

    assert allocated(prompt(0), prompt(0, before=9)) == 2 * allocated(prompt(0, before=9))


@pytest.mark.parametrize(("before", "limit"), [(0, 16), (0, 256), (70, 16)])
def test_what_the_buffers_take_stays_within_the_limit(model, before, limit):
    engine = model.engine(max_bytes=1)
    for seed in range(24):
        engine.add(prompt(seed, before=before), max_new_tokens=limit, eos_token_id=list(range(0, 100, 7)))
    engine.max_bytes = 10 * engine.waiting[0].cache_bytes.sum()
    most = rows = 0
    while engine.busy:
        engine.step()
        most, rows = max(most, engine.runner.batch.cache.allocated()), max(rows, len(engine.active))
    assert most <= engine.max_bytes
    assert rows >= 8, "buffers have room for some rows more than they hold"


def test_rows_come_back_after_a_long_prompt(model):
    """The queue is never empty, so that the buffers are never given up as a whole."""
    engine, lengths = model.engine(max_bytes=1), itertools.cycle(range(4, 12))
    engine.runner.batch.cache.reserve = 12

    def rows():
        while len(engine.waiting) < 12:
            engine.add(prompt(0), max_new_tokens=next(lengths), eos_token_id=-1)
        engine.step()
        return len(engine.active)

    rows()
    engine.max_bytes = 12 * engine.waiting[0].cache_bytes.sum()
    before = [rows() for _ in range(30)][-20:]
    engine.add(prompt(0, before=95), max_new_tokens=4, eos_token_id=-1)
    after = [rows() for _ in range(60)][-20:]
    assert sum(after) > 0.8 * sum(before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 5},
        {"keep": 5, "final_wipe": 4},
        {"retain": 8, "pruner": "fastv"},
        {"retain": 8, "pruner": "visionzip"},
    ],
    ids=["all tokens", "the twig's", "FinalWipe", "FastV", "VisionZip"],
)
def test_a_row_takes_the_room_that_it_was_admitted_for(model, options):
    """No method but the twig's fills the twig's layers, where nothing is drafted."""
    engine = model.engine()
    engine.add(prompt(0), max_new_tokens=4, eos_token_id=-1, **options)
    admitted = engine.waiting[0].cache_bytes
    engine.step()
    assert engine.runner.batch.cache.bytes_of_a_row().tolist() == admitted.tolist()


def test_rows_join_where_there_is_room_already(model):
    """Also where an answer has made the buffers larger than they may become."""
    engine, lengths = model.engine(max_bytes=1), itertools.cycle([60, *[8] * 11])
    engine.runner.batch.cache.reserve = 16
    for _ in range(96):
        engine.add(prompt(0), max_new_tokens=next(lengths), eos_token_id=-1)
    engine.max_bytes = 8 * engine.waiting[0].cache_bytes.sum()
    active = []
    while engine.busy:
        engine.step()
        active.append(len(engine.active))
    assert len(active) < 200


def test_a_row_leaves_although_there_is_no_memory_to_copy_into(model, monkeypatch):
    engine = model.engine()
    engine.runner.batch.cache.reserve = 1
    long = engine.add(prompt(0, before=95), max_new_tokens=8)
    short = engine.add(prompt(1), max_new_tokens=8, eos_token_id=-1)
    got = [token for event in engine.step() if event.id == short for token in event.tokens]

    def clone(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    engine.cancel(long)
    monkeypatch.undo()
    got += [token for event in engine.stream() for token in event.tokens]
    expected = model.generate(**prompt(1), max_new_tokens=8, eos_token_id=-1)
    assert got == expected[0, prompt(1)["input_ids"].shape[1] :].tolist()
