"""The states of prompts are large: rows that decode, wait for nothing or have ended do not hold them."""

import gc
import weakref

import pytest
import torch

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwigVLM.grow(tiny_llava(deep_scale=0.5, from_layer=2), TwigConfig(2, 2, pruning_head=True))


@pytest.mark.parametrize("way", ["none", "chain"])
def test_a_prompts_states_are_given_up_after_its_prefill(model, way, monkeypatch):
    """Not only once the garbage collector finds them."""
    states, make = [], model.base.prompt

    def watched(**inputs):
        made = make(**inputs)
        states.append(weakref.ref(made.hidden))
        return made

    monkeypatch.setattr(model.base, "prompt", watched)
    gc.collect()
    gc.disable()
    try:
        engine = model.engine(speculate=way, max_rows=2)
        engine.add(prompt(0), keep=5, max_new_tokens=8)
        engine.add(prompt(1), max_new_tokens=8)
        waiting = engine.add(prompt(2), max_new_tokens=8)
        engine.step()
        assert [state() is None for state in states] == [True, True, False]
        engine.cancel(waiting)
        assert states[2]() is None
    finally:
        gc.enable()
