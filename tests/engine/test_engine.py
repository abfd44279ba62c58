"""Continuous batching: a row gets the answer that it gets alone, whatever joins, leaves or is cancelled beside it."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import batched
from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.engine.row import Request
from twigvlm.pruning.cut import Cut
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.methods.random import RandomScores
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.select import best_of_each_image, top_visual
from twigvlm.speculation.costs import StepCosts

WAYS = {
    "none": {},
    "chain": {"draft_threshold": 0.05, "draft_length": 3},
    "tree": {"tree_nodes": 8, "tree_expand": 2, "tree_width": 3, "tree_depth": 3},
    "auto": {"tree_width": 3},
}


@dataclass(frozen=True)
class ThreeCuts:
    """A schedule like PyramidDrop's: three cuts, each of which keeps the first tokens of what is left."""

    needs = frozenset()

    def cuts(self, retain, visual, layers):
        return Cut(1, 12), Cut(3, 7), Cut(5, 2)

    def choose(self, view, keep):
        order = -torch.arange(view.tokens.visual.shape[1], dtype=torch.float32)
        return top_visual(order.expand_as(view.tokens.visual), view.tokens.visual, keep)


PRUNINGS = (
    {},
    {"keep": 5},
    {"retain": 8, "final_wipe": 4},
    {"pruner": ThreeCuts()},
    {"keep": 6, "refocus": 0.9, "final_wipe": 4, "final_share": 0.5},
)


@cache
def model() -> TwigVLM:
    torch.manual_seed(0)
    model = TwigVLM.grow(tiny_llava(deep_scale=0.5, from_layer=2), TwigConfig(2, 2, pruning_head=True))
    passes = tuple(0.01 * n for n in range(65))
    costs = StepCosts(passes, tuple(0.1 * t for t in passes), tuple(0.05 + 0.1 * t for t in passes), 1e-4)
    model.costs = lambda: costs  # type: ignore[method-assign]
    return model


def asked(seed, pruning, tokens, eos):
    inputs = prompt(seed, before=2 + seed % 3, after=4 + seed % 5)
    return inputs, {**PRUNINGS[pruning], "max_new_tokens": tokens, "eos_token_id": eos}


@cache
def alone(way, seed, pruning, tokens, eos):
    inputs, options = asked(seed, pruning, tokens, eos)
    output = model().generate(**inputs, **options, speculate=way, **WAYS[way])
    return output[0, inputs["input_ids"].shape[1] :].tolist()


requests = st.tuples(
    st.integers(0, 5),  # prompt
    st.integers(0, len(PRUNINGS) - 1),
    st.sampled_from([1, 4, 9, 14]),
    st.sampled_from([97, 62, 26]),  # a token that ends the answer, which occurs in some
    st.integers(0, 6),  # steps before it joins
    st.sampled_from([None, None, None, 0, 2, 4]),  # steps that it has before it is cancelled
)


@pytest.mark.parametrize("way", WAYS)
@given(schedule=st.lists(requests, min_size=1, max_size=6), max_rows=st.sampled_from([None, 1, 3]))
@settings(max_examples=8)
def test_a_row_gets_the_answer_that_it_gets_alone(way, schedule, max_rows):
    engine = model().engine(max_rows=max_rows, speculate=way, **WAYS[way])
    got, want, cancelled, ended = {}, {}, {}, set()
    for step in range(200):
        for seed, pruning, tokens, eos, joins, gives_up in schedule:
            if joins == step:
                inputs, options = asked(seed, pruning, tokens, eos)
                request = engine.add(inputs, **options)
                got[request], want[request] = [], alone(way, seed, pruning, tokens, eos)
                if gives_up is not None:
                    cancelled[request] = step + gives_up
        for request, when in cancelled.items():
            if when == step and request not in ended:
                engine.cancel(request)
                ended.add(request)
        for event in engine.step():
            assert event.id not in ended
            got[event.id] += event.tokens
            if event.finished:
                ended.add(event.id)
        if not engine.busy and step > 6:
            break
    assert not engine.busy
    for request, answer in got.items():
        expected = want[request]
        assert answer == (expected[: len(answer)] if request in cancelled else expected)


@pytest.mark.parametrize("way", WAYS)
def test_forks_share_their_prompt_and_nothing_else(way):
    vlm = model()
    inputs, options = asked(1, 0, 12, 97)
    engine = vlm.engine(speculate=way, **WAYS[way])
    plain = engine.add(inputs, **options)
    forks = {engine.fork(plain, ThreeCuts()): 3}
    got = {request: [] for request in (plain, *forks)}
    for event in engine.stream():
        got[event.id] += event.tokens
    assert got[plain] == alone(way, 1, 0, 12, 97)
    for request, pruning in forks.items():
        assert got[request] == alone(way, 1, pruning, 12, 97)


@dataclass(frozen=True)
class Fixed(ThreeCuts):
    """Pruners with tensors cannot be compared."""

    scores: torch.Tensor

    def choose(self, view, keep):
        visual = view.tokens.visual
        return top_visual(self.scores[: visual.shape[1]].expand_as(visual), visual, keep)


def test_forks_of_one_method_with_tensors_of_their_own():
    """One after another in the queue, beside a request that knows nothing of their prefix cache."""
    vlm = model()
    pruners = [Fixed(torch.arange(64.0)), Fixed(-torch.arange(64.0))]
    (inputs, options), engine = asked(1, 0, 9, 97), vlm.engine()
    rows = [engine.make_row(inputs, **options) for _ in range(2)]
    rows[1].prompt = rows[0].prompt
    plain, beside = engine.submit(rows)
    forks = [engine.fork(plain, pruner) for pruner in pruners]
    got = {request: [] for request in (plain, beside, *forks)}
    for event in engine.stream():
        got[event.id] += event.tokens
    assert got[plain] == got[beside] == alone("none", 1, 0, 9, 97)
    for fork, pruner in zip(forks, pruners, strict=True):
        output = vlm.generate(**inputs, **options, pruner=pruner)
        assert got[fork] == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_fork_looks_again_by_the_twig_s_own_ranking_alone():
    vlm = model()
    own = TwigPruner(default_scorer(vlm.twig), 2, 5, keep=6)
    others = (
        ThreeCuts(),
        replace(own, scorer=RandomScores()),
        replace(own, select=best_of_each_image),
        replace(own, trunk_layers=3),
        None,
    )
    engine = vlm.engine()
    plain = engine.add(prompt(0), max_new_tokens=4)
    for pruner in others:
        with pytest.raises(TwigVLMError, match="only at the end of the prompt"):
            engine.fork(plain, pruner, refocus=0.9)
    with pytest.raises(TwigVLMError, match=r"refocus=2: must be"):
        engine.fork(plain, own, refocus=2.0)
    fork, got = engine.fork(plain, own, refocus=0.9), []
    for event in engine.stream():
        got += event.tokens if event.id == fork else []
    output = vlm.generate(**prompt(0), keep=6, final_wipe=5, refocus=0.9, max_new_tokens=4)
    assert got == output[0, prompt(0)["input_ids"].shape[1] :].tolist()


def test_a_row_that_looks_again_needs_more_memory():
    """States of 16 tokens of width 32, and twice their keys in 4 heads of 8, in float32."""
    vlm, needed = model(), []
    for pruning in ({"keep": 6}, {"keep": 6, "refocus": 0.9}):
        engine = vlm.engine()
        engine.add(prompt(0), **pruning, max_new_tokens=4)
        needed.append(engine.waiting[0].cache_bytes.sum() + engine.waiting[0].refocus_bytes)
    assert needed[1] - needed[0] == 16 * (32 + 2 * 32) * 4


def test_rows_that_decode_and_look_again_keep_their_memory():
    vlm = model()
    engine = vlm.engine()
    options = {"keep": 6, "refocus": 0.9, "max_new_tokens": 20}
    engine.add(prompt(0), **options)
    engine.step()
    engine.add(prompt(1), **options)
    both = engine.runner.batch.cache.bytes_of_a_row().sum() * 2 + engine.waiting[0].refocus_bytes
    engine.max_bytes = both  # which leaves out what the first row looks at
    engine.step()
    assert len(engine.waiting) == 1
    engine.max_bytes = 10**9
    engine.step()
    assert not engine.waiting


def test_what_does_not_fit_into_memory_waits():
    vlm = model()
    engine = vlm.engine(max_bytes=1)
    requests = [engine.add(*(asked(seed, 0, 3, 97)[0],), max_new_tokens=3) for seed in range(3)]
    running = []
    while engine.busy:
        engine.step()
        running.append(len(engine.active))
    assert max(running) == 1
    assert len(requests) == 3


@pytest.mark.parametrize("max_rows", [1, 2, 3])
def test_no_more_rows_decode_together_than_max_rows(max_rows):
    """Rows of one batch, which one prefill takes up, and forks, which share a prompt, wait for room like others."""
    vlm = model()
    engine = vlm.engine(max_rows=max_rows)
    expected, together = {}, vlm.base.prompt(**batched([asked(seed, 0, 4, 97)[0] for seed in range(4)]))
    rows = [engine.make_row(asked(seed, 0, 4, 97)[0], max_new_tokens=4, eos_token_id=97) for seed in range(4)]
    request = Request(together.input_ids, [0] * 4, rows=rows)
    for seed, row in enumerate(rows):
        row.request, row.prompt, row.index = request, together, seed
    for seed, id in enumerate(engine.submit(rows)):
        expected[id] = alone("none", seed, 0, 4, 97)
    inputs, options = asked(4, 0, 9, 97)
    plain = engine.add(inputs, **options)
    forks = {engine.fork(plain, ThreeCuts()): 3 for _ in range(3)}
    expected |= {request: alone("none", 4, pruning, 9, 97) for request, pruning in {plain: 0, **forks}.items()}
    got, running = {request: [] for request in expected}, []
    while engine.busy:
        for event in engine.step():
            got[event.id] += event.tokens
        running.append(len(engine.active))
    assert max(running) == max_rows
    assert got == expected


def test_rows_that_outgrew_their_estimate_keep_others_waiting():
    """Memory is measured where an answer is longer than what its row was admitted with."""
    vlm = model()
    engine = vlm.engine()
    engine.runner.batch.cache.reserve = 2
    first = engine.add(prompt(0), max_new_tokens=40)
    for _ in range(20):
        engine.step()
    second = engine.add(prompt(1), max_new_tokens=4)
    engine.max_bytes = sum(row.cache_bytes.sum() for row in (*engine.active, *engine.waiting))
    events = list(engine.stream())
    ends = next(place for place, event in enumerate(events) if event.id == first and event.finished)
    assert ends < next(place for place, event in enumerate(events) if event.id == second)


def test_a_prompt_that_cannot_be_taken_up_leaves_the_others_be():
    vlm = model()
    engine = vlm.engine()
    good, options = asked(0, 1, 6, 97)
    first = engine.add(good, **options)

    def refuses(trunk):
        raise TwigVLMError("no scores")

    bad = engine.add(good, **{**options, "scorer": refuses})
    got = {first: [], bad: []}
    failures = 0
    while engine.busy:
        try:
            events = engine.step()
        except TwigVLMError:
            failures += 1
            continue
        for event in events:
            got[event.id] += event.tokens
    assert failures == 1
    assert got[bad] == []
    assert got[first] == alone("none", 0, 1, 6, 97)


def test_what_is_not_there_cannot_be_cancelled_or_forked():
    engine = model().engine()
    request = engine.add(asked(0, 0, 1, 97)[0], max_new_tokens=1)
    list(engine.stream())
    for call in (lambda: engine.cancel(request), lambda: engine.fork(request, None)):
        with pytest.raises(TwigVLMError, match=f"request {request}"):
            call()
    with pytest.raises(TwigVLMError, match="max_rows=0"):
        model().engine(max_rows=0)
    with pytest.raises(TwigVLMError, match="one by one"):
        engine.add(asked(0, 0, 1, 97)[0], max_new_tokens=1, do_sample=True, num_return_sequences=2)
