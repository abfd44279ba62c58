"""A request that cannot be started is named, and what finds no memory leaves an engine as it was."""

import pytest
import torch

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.engine import runner


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwigVLM.grow(tiny_llava(deep_scale=0.5, from_layer=2), TwigConfig(2, 2, pruning_head=True))


@pytest.mark.parametrize("error", [ValueError("no scores"), MemoryError(), torch.OutOfMemoryError("no room")])
def test_whatever_ends_a_prefill_its_request_is_named(model, error):
    def raises(trunk):
        raise error

    engine = model.engine()
    first = engine.add(prompt(0), max_new_tokens=3, keep=5)
    broken = engine.add(prompt(1), max_new_tokens=3, keep=5, scorer=raises)
    with pytest.raises(type(error)) as caught:
        engine.step()
    assert caught.value is error
    assert error.requests == (broken,)
    assert [event.id for event in engine.stream() if event.finished] == [first]


@pytest.mark.parametrize("part", ["Refocus", "Chooser"])
def test_a_cancellation_that_finds_no_memory_changes_nothing(model, monkeypatch, part):
    engine, options = model.engine(), {"keep": 5, "refocus": 0.95, "max_new_tokens": 12}
    requests = [engine.add(prompt(seed), **options) for seed in range(3)]
    got = {request: [] for request in requests}

    def take(events):
        for event in events:
            got[event.id] += event.tokens

    def scarce(*arguments):
        raise torch.OutOfMemoryError

    take(engine.step())
    with monkeypatch.context() as patched:
        patched.setattr(runner, part, scarce)
        with pytest.raises(torch.OutOfMemoryError):
            engine.cancel(requests[0])
    take(engine.step())
    engine.cancel(requests[0])
    take(engine.stream())
    for seed, request in enumerate(requests):
        answer = model.generate(**prompt(seed), **options)[0, prompt(seed)["input_ids"].shape[1] :].tolist()
        assert got[request] == (answer if seed else answer[: len(got[request])])
    assert len(got[requests[0]]) == 3


def test_a_prefill_that_finds_no_memory_at_its_end_takes_up_no_row(model, monkeypatch):
    engine = model.engine()
    first = engine.add(prompt(0), max_new_tokens=6)
    got = [token for event in engine.step() for token in event.tokens]
    second = engine.add(prompt(1), max_new_tokens=6)

    class Scarce(runner.Chooser):
        def __init__(self, rows, device):
            if len(rows) > 1:  # those of the whole batch
                raise torch.OutOfMemoryError
            super().__init__(rows, device)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "Chooser", Scarce)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            engine.step()
    assert caught.value.requests == (second,)
    got += [token for event in engine.stream() if event.id == first for token in event.tokens]
    assert got == model.generate(**prompt(0), max_new_tokens=6)[0, prompt(0)["input_ids"].shape[1] :].tolist()
