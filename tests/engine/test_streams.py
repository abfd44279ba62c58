"""Events of an engine are neither lost nor handed on twice, however they are read."""

import itertools

import pytest
import torch

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwigVLM.grow(tiny_llava(deep_scale=0.5, from_layer=2), TwigConfig(2, 2, pruning_head=True))


@pytest.mark.parametrize("read", [1, 2, 4])
def test_a_loop_over_a_stream_may_be_left_and_begun_again(model, read):
    """After some of the events of a step, the last of which may end answers."""
    expected = {}
    engine = model.engine()
    for seed, length in enumerate((1, 2, 5)):
        answer = model.generate(**prompt(seed), max_new_tokens=length)
        request = engine.add(prompt(seed), max_new_tokens=length)
        expected[request] = answer[0, prompt(seed)["input_ids"].shape[1] :].tolist()
    got, loops = {request: [] for request in expected}, 0
    while engine.busy:
        for event in itertools.islice(engine.stream(), read):
            got[event.id] += event.tokens
        loops += 1
    assert got == expected
    assert loops > 1


def test_steps_return_what_a_stream_has_not(model):
    engine = model.engine()
    requests = [engine.add(prompt(seed), max_new_tokens=1) for seed in range(3)]
    assert next(engine.stream()).id == requests[0]
    assert [event.id for event in engine.step()] == requests[1:]
    assert not engine.busy
