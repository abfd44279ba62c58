"""Prompt lookup needs no twig and changes no answer."""

import pytest
import torch

from tests import families
from tests.batches import batched
from tests.engine.engines import engine_on, make_runner
from tests.tiny import prompt, tiny_llava
from tests.twigs import grown
from twigvlm import TwigVLM

LOOKUP = {"speculate": "lookup", "draft_length": 4}
PRUNINGS = [{}, {"pruner": "visionzip", "retain": 8}, {"pruner": "fastv", "retain": 8}]
LONG = {"max_new_tokens": 30, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def bare():
    """A base without a twig, whose layers mostly pass on what they get, so that its answers repeat themselves."""
    return TwigVLM.without_twig(tiny_llava(2, deep_scale=0.03))


def test_ids_may_be_of_32_bits():
    inputs = prompt(0)
    short = {**inputs, "input_ids": inputs["input_ids"].int()}
    answers = [grown().generate(**each, max_new_tokens=8, speculate="lookup") for each in (inputs, short)]
    assert answers[0].tolist() == answers[1].tolist()


@pytest.mark.parametrize("pruning", PRUNINGS, ids=["unpruned", "visionzip", "fastv"])
def test_a_base_without_a_twig_answers_as_before_in_fewer_steps(bare, pruning):
    steps = 0
    for seed in range(3):
        inputs = prompt(seed)
        plain = bare.generate(**inputs, **pruning, **LONG)
        if not pruning:
            assert plain.sequences.tolist() == bare.model.generate(**inputs, max_new_tokens=30).tolist()
        output = bare.generate(**inputs, **pruning, **LOOKUP, **LONG)
        assert output.sequences.tolist() == plain.sequences.tolist()
        assert sum(output.accepted_lengths[0]) + len(output.accepted_lengths[0]) == 30
        steps += len(output.accepted_lengths[0])
    assert steps < 80


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_families_with_windows_or_three_axes(name):
    base = families.tiny(name)
    model = TwigVLM.without_twig(base)
    batch = batched([families.prompt(base, name, kind) for kind in ("images", "text")])
    expected = base.generate(**batch, max_new_tokens=20, do_sample=False)
    output = model.generate(**batch, **LOOKUP, max_new_tokens=20, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.tolist()
    assert sum(map(sum, output.drafted_lengths)) > 0


@pytest.mark.parametrize("pruning", [{}, {"keep": 5, "final_wipe": 4}, {"keep": 5, "refocus": 0.9}])
def test_a_batch_is_as_if_alone_beside_a_twig(pruning):
    prompts = [prompt(seed, 2 + seed, 4) for seed in range(3)]
    output = grown().generate(**batched(prompts), **pruning, **LOOKUP, **LONG)
    for row, inputs in enumerate(prompts):
        alone = grown().generate(**inputs, **pruning, **LONG)
        new = alone.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert output.sequences[row, -30:].tolist() == new
        if "refocus" in pruning:
            padding = output.sequences.shape[1] - alone.sequences.shape[1]
            assert [(look.after, look.kept.tolist()) for look in output.looks[row]] == [
                (look.after, (look.kept + padding).tolist()) for look in alone.looks[0]
            ]
            assert alone.looks[0]


def test_a_seed_draws_the_same_and_a_streamer_gets_every_token(bare):
    class Streamed:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    for seed in range(3):
        options = {"do_sample": True, "temperature": 0.4, "top_k": 0, "max_new_tokens": 20}
        torch.manual_seed(seed)
        expected = bare.model.generate(**prompt(seed), **options)
        torch.manual_seed(seed)
        streamer = Streamed()
        assert bare.generate(**prompt(seed), **options, **LOOKUP, streamer=streamer).tolist() == expected.tolist()
        assert streamer.tokens == expected[0].tolist()


@pytest.mark.parametrize("static", [False, True], ids=["exact", "static"])
def test_rows_join_and_leave(bare, static):
    """Answers and drafts do not depend on who else decodes, though rows of an engine share one table of ids."""
    prompts = [prompt(seed, 2 + 3 * seed) for seed in range(4)]
    lengths = [25, 5, 18, 9]
    engine = engine_on(bare, make_runner(bare, static, **LOOKUP))
    answers = {}
    for inputs, length in zip(prompts, lengths, strict=True):
        answers[engine.add(inputs, max_new_tokens=length)] = []
        engine_events(engine.step(), answers)
        engine_events(engine.step(), answers)
    while engine.busy:
        engine_events(engine.step(), answers)
    for answer, inputs, length in zip(answers.values(), prompts, lengths, strict=True):
        expected = bare.model.generate(**inputs, max_new_tokens=length)
        assert answer == expected[0, inputs["input_ids"].shape[1] :].tolist()


def engine_events(events, answers):
    for event in events:
        answers[event.id] += event.tokens
