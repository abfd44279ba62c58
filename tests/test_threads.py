"""Several threads on one base: with the twig, without it, and the base itself; none notices the others."""

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import pytest
import torch
from torch import nn

from tests.families import prompt, tiny
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.base.vision import VisionModules

NEW = {"max_new_tokens": 8}
WAYS = (
    {},
    {"keep": 6},
    {"speculate": "chain", "draft_threshold": 0.0},
    {"keep": 6, "speculate": "tree", "tree_nodes": 12, "tree_expand": 3},
    {"pruner": "visionzip", "retain": 12},
)


@pytest.fixture
def model():
    return TwigVLM.grow(tiny("llava"), TwigConfig(2, 2))


def in_another_thread(call):
    """What a call returns, or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def stop_within(module):
    """Let the next pass of a thread stop before a module, until it is told to go on: (it is there, go on)."""
    there, go_on = Event(), Event()

    def wait(_module, _inputs):
        hook.remove()
        there.set()
        go_on.wait()

    hook = module.register_forward_pre_hook(wait)
    return there, go_on


def test_eight_threads_of_mixed_use(model):
    base = model.model
    prompts = [prompt(base, "llava", "images", seed) for seed in range(2)]

    def with_twig(inputs, way):
        return model.generate(**inputs, **NEW, **way).tolist()

    def base_alone(inputs):
        return base.generate(**inputs, **NEW).tolist()

    def disabled(inputs):
        with model.disabled():
            return model.generate(**inputs, **NEW).tolist()

    @torch.no_grad()
    def logits(inputs):
        return base(**inputs).logits.tolist()

    jobs = [(call, (inputs,)) for inputs in prompts for call in (base_alone, disabled, logits)]
    jobs += [(with_twig, (inputs, way)) for inputs in prompts for way in WAYS]
    expected = [call(*arguments) for call, arguments in jobs]
    together = Barrier(8)

    def run(thread):
        together.wait()
        order = [*range(thread, len(jobs)), *range(thread)]
        return [(index, jobs[index][0](*jobs[index][1])) for index in order]

    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(run, range(8)):
            for index, answer in answers:
                assert answer == expected[index], jobs[index]


@torch.no_grad()
def test_the_base_runs_while_a_prompt_is_captured(model):
    base, inputs = model.model, prompt(model.model, "llava", "images")
    expected = base(**inputs).logits
    there, go_on = stop_within(base.model.language_model)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(model.generate, **inputs, **NEW)
        there.wait()
        try:
            assert torch.equal(base(**inputs).logits, expected)
        finally:
            go_on.set()
        assert torch.equal(answer.result(), base.generate(**inputs, **NEW))


def test_a_watch_of_the_vision_tower_may_end_in_the_midst_of_another(model):
    inputs, way = prompt(model.model, "llava", "images"), {"pruner": "visionzip", "retain": 12}
    expected = model.generate(**inputs, **NEW, **way)
    watching, leave = Event(), Event()

    def watch():
        with model.base.watch_vision():
            watching.set()
            leave.wait()

    thread = Thread(target=watch)

    def end_the_other(_module, _inputs):
        leave.set()
        thread.join()

    projector = VisionModules.of(model.model, model.base.family.tower).projector
    thread.start()
    watching.wait()
    hook = projector.register_forward_pre_hook(end_the_other)
    try:
        assert torch.equal(model.generate(**inputs, **NEW, **way), expected)
    finally:
        hook.remove()
        leave.set()


@torch.no_grad()
def test_the_base_runs_bit_for_bit_while_a_pass_over_a_few_tokens_does(model):
    base = model.model
    few = {"input_ids": torch.tensor([[5, 7, 9]])}
    expected = base(**few).logits
    there, go_on = stop_within(base.model.language_model.layers[3].mlp)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(model.generate, **few, **NEW)
        there.wait()
        try:
            assert torch.equal(base(**few).logits, expected)
        finally:
            go_on.set()
        assert torch.equal(answer.result(), base.generate(**few, **NEW))


def test_disabled_belongs_to_its_thread(model):
    inputs = prompt(model.model, "llava", "images")
    chain = WAYS[2]
    expected = model.generate(**inputs, **NEW, **chain)
    with model.disabled():
        assert torch.equal(in_another_thread(lambda: model.generate(**inputs, **NEW, **chain)), expected)
        with pytest.raises(TwigVLMError, match="while the twig is disabled"):
            model.generate(**inputs, **NEW, **chain)


def test_disabled_ends_with_its_context_however_threads_overlap(model):
    inputs = prompt(model.model, "llava", "images")
    inside, leave = Event(), Event()

    def other():
        with model.disabled():
            inside.set()
            leave.wait()

    thread = Thread(target=other)
    with model.disabled():
        thread.start()
        inside.wait()
    leave.set()
    thread.join()
    assert model.generate(**inputs, **NEW, **WAYS[2]).shape[0] == 1


def test_disabled_is_one_model_s(model):
    other = TwigVLM.grow(tiny("llava"), TwigConfig(2, 2))
    inputs = prompt(model.model, "llava", "images")
    with model.disabled(), other.disabled():
        pass
    with other.disabled():
        with other.disabled():
            pass
        assert model.generate(**inputs, **NEW, **WAYS[2]).shape[0] == 1
        with pytest.raises(TwigVLMError, match="while the twig is disabled"):
            other.generate(**inputs, **NEW, **WAYS[2])


def test_disabled_belongs_to_its_task(model):
    inputs = prompt(model.model, "llava", "images")

    async def run():
        inside, leave = asyncio.Event(), asyncio.Event()

        async def other():
            with model.disabled():
                inside.set()
                await leave.wait()

        task = asyncio.create_task(other())
        await inside.wait()
        answer = model.generate(**inputs, **NEW, **WAYS[2])
        leave.set()
        await task
        return answer

    assert asyncio.run(run()).shape[0] == 1


def test_a_user_s_patch_of_all_linear_layers_stays(model, monkeypatch):
    inputs, calls, usual = prompt(model.model, "llava", "images"), [], nn.Linear.forward

    def counted(layer, input):
        calls.append(layer)
        return usual(layer, input)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    model.generate(**inputs, **NEW, **WAYS[2])
    assert nn.Linear.forward is counted
    base, twig = model.model.model.language_model.layers, model.twig.layers
    assert {layer.mlp.up_proj for layer in (*base, *twig)} <= set(calls)


def test_an_answer_leaves_nothing_on_the_base(model):
    inputs = prompt(model.model, "llava", "images")
    state = {name: list(vars(part)) for name, part in model.named_modules()}
    hooks = [part._forward_pre_hooks for part in model.modules()]
    for way in WAYS:
        model.generate(**inputs, **NEW, **way)
    with pytest.raises(TwigVLMError):
        model.generate(inputs["input_ids"], pixel_values=inputs["pixel_values"][:1], **NEW)
    assert {name: list(vars(part)) for name, part in model.named_modules()} == state
    assert not any(hooks)


def test_a_copy_answers_as_its_original(model):
    inputs = prompt(model.model, "llava", "images")
    other = copy.deepcopy(model)
    assert other.base.model is other.model
    for way in WAYS:
        assert torch.equal(other.generate(**inputs, **NEW, **way), model.generate(**inputs, **NEW, **way))
