"""What goes wrong in an engine stays with whom it belongs to, and what an engine cannot do is refused."""

import pytest
import torch
from transformers import LogitsProcessor, SynthIDTextWatermarkingConfig, TextStreamer

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.errors import RequestRefused
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.cut import Cut
from twigvlm.pruning.methods import make_pruner
from twigvlm.pruning.methods.fastv import FastV
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.methods.twig_attention import TwigAttention


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwigVLM.grow(tiny_llava(deep_scale=0.5, from_layer=2), TwigConfig(2, 2, pruning_head=True))


class Fails(LogitsProcessor):
    """As a user's own may, at the third token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            raise TwigVLMError("allows no token")
        return scores


@pytest.mark.parametrize("way", ["none", "chain"])
def test_after_half_a_step_an_engine_refuses_instead_of_going_on_with_wrong_caches(model, way):
    engine = model.engine(speculate=way)
    engine.add(prompt(0), max_new_tokens=12)
    engine.add(prompt(1), max_new_tokens=12, logits_processor=[Fails()])
    with pytest.raises(TwigVLMError, match="allows no token"):
        list(engine.stream())
    assert not engine.busy
    for call in (engine.step, lambda: engine.add(prompt(2), max_new_tokens=2)):
        with pytest.raises(TwigVLMError, match="failed within an earlier step"):
            call()


@pytest.mark.parametrize("way", ["none", "chain"])
def test_sampled_requests_without_a_generator_do_not_disturb_each_other(model, way):
    def second(beside):
        torch.manual_seed(3)
        engine = model.engine(speculate=way)
        first = engine.add(prompt(0), max_new_tokens=3, do_sample=True)
        wanted = engine.add(prompt(1), max_new_tokens=20, do_sample=True)
        if not beside:
            engine.cancel(first)
        return [token for event in engine.stream() if event.id == wanted for token in event.tokens]

    assert second(beside=True) == second(beside=False)


def test_an_idle_engine_holds_no_keys_and_values(model):
    engine = model.engine(speculate="chain")
    cache = engine.runner.batch.cache
    for _ in range(2):
        answers = {engine.add(prompt(seed), keep=6, max_new_tokens=6): seed for seed in range(3)}
        engine.step()
        assert cache.allocated() > 0
        got = {request: [] for request in answers}
        got |= {event.id: event.tokens for event in engine.stream() if event.finished}
        assert cache.allocated() == 0


def test_half_a_prompt_is_not_taken_for_a_whole_one(model, monkeypatch):
    """A prompt whose prefill fails may have replaced the first layers of another one in their prefix cache."""

    def with_ids(*more):
        inputs = prompt(0)
        ids = torch.cat((inputs["input_ids"], torch.tensor([more])), dim=1)
        return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def ask(inputs):
        engine.add(inputs, memory=memory, max_new_tokens=8, do_sample=False)
        return [token for event in engine.stream() for token in event.tokens]

    engine, memory, store = model.engine(), PrefixCache(), PrefixCache._store
    ask(with_ids(5, 6, 7))

    def half(self, view, start, stop):
        store(self, view, start, start + 1)
        raise MemoryError

    monkeypatch.setattr(PrefixCache, "_store", half)
    with pytest.raises(MemoryError):
        ask(with_ids(50, 61, 72, 83))
    monkeypatch.setattr(PrefixCache, "_store", store)
    longer = with_ids(5, 6, 7, 3, 4)
    expected = model.generate(**longer, max_new_tokens=8, do_sample=False)
    assert ask(longer) == expected[0, longer["input_ids"].shape[1] :].tolist()


def test_forks_take_the_pruners_that_requests_take(model):
    engine = model.engine()
    request = engine.add(prompt(0), max_new_tokens=6)
    fork = engine.fork(request, "twig", 9.0)
    with pytest.raises(TwigVLMError, match="pruner=FastV: is no pruning method"):
        engine.fork(request, FastV, 9.0)
    got = {request: [], fork: []}
    for event in engine.stream():
        got[event.id] += event.tokens
    for number, options in ((request, {}), (fork, {"retain": 9.0})):
        expected = model.generate(**prompt(0), **options, max_new_tokens=6)
        assert got[number] == expected[0, prompt(0)["input_ids"].shape[1] :].tolist()


def test_a_request_cancelled_while_events_are_handed_on_gets_no_more(model):
    engine = model.engine()
    requests = [engine.add(prompt(seed), max_new_tokens=length) for seed, length in enumerate((4, 4, 1))]
    seen, stream = [], engine.stream()
    for event in stream:
        seen.append(event.id)
        if len(seen) == 1:  # the others' events of this step are not handed on yet, and one of them has ended
            for request in requests[1:]:
                engine.cancel(request)
    assert seen == [requests[0]] * 4
    with pytest.raises(TwigVLMError, match="does not exist, or has ended"):
        engine.cancel(requests[0])


@pytest.mark.parametrize("way", ["none", "chain"])
def test_two_requests_cannot_draw_from_one_generator(model, way):
    engine, generator = model.engine(speculate=way), torch.Generator().manual_seed(0)
    options = {"max_new_tokens": 6, "do_sample": True}
    request = engine.add(prompt(0), **options, generator=generator)
    with pytest.raises(TwigVLMError, match="generator: another request still draws from it"):
        engine.add(prompt(1), **options, generator=generator)
    tokens = [token for event in engine.stream() if event.id == request for token in event.tokens]
    alone = model.generate(**prompt(0), **options, generator=torch.Generator().manual_seed(0))
    assert tokens == alone[0, -6:].tolist()
    engine.add(prompt(1), **options, generator=generator)  # the first one has ended


def test_a_prompt_that_cannot_be_pruned_is_refused_when_it_is_added(model):
    engine, inputs = model.engine(), prompt(0, after=0)
    with pytest.raises(TwigVLMError, match="ends with a visual token"):
        engine.add(inputs, keep=4, max_new_tokens=2)
    assert not engine.busy


class Refuses:
    """A pruner that a prompt is too much for, which shows only when it is asked."""

    needs = frozenset()

    def cuts(self, retain, visual, layers):
        return (Cut(2, 4),)

    def choose(self, view, keep):
        raise TwigVLMError("pruner: cannot choose; name another one")


def test_a_refusal_within_a_step_names_its_request(model):
    engine = model.engine(max_rows=1)
    first = engine.add(prompt(0), max_new_tokens=2)
    refused = engine.add(prompt(1), max_new_tokens=2, pruner=Refuses())
    last = engine.add(prompt(2), max_new_tokens=2)
    ended = []

    def go_on():
        for event in engine.stream():
            if event.finished:
                ended.append(event.id)

    with pytest.raises(RequestRefused, match="cannot choose; name another one") as caught:
        go_on()
    assert caught.value.requests == (refused,)
    go_on()
    assert ended == [first, last]


@pytest.mark.parametrize("way", ["none", "chain"])
@pytest.mark.parametrize("factor", [float("nan"), -float("inf")])
def test_no_token_is_drawn_from_scores_that_leave_none(model, way, factor):
    with pytest.raises(TwigVLMError, match="logits_processor: leaves no token to draw"):
        model.generate(
            **prompt(0),
            max_new_tokens=3,
            do_sample=True,
            speculate=way,
            logits_processor=[lambda ids, scores: torch.full_like(scores, factor)],
        )


@pytest.mark.parametrize("way", ["none", "chain", "tree"])
def test_no_token_is_drawn_where_every_one_is_suppressed(model, way):
    everything = list(range(model.base.vocabulary))
    with pytest.raises(TwigVLMError, match="there is no token to draw"):
        model.generate(
            **prompt(0), max_new_tokens=3, do_sample=True, speculate=way, suppress_tokens=everything, temperature=0.5
        )


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": [Fails()]},
        {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=3)},
    ],
    ids=["own", "watermark"],
)
def test_a_fork_cannot_share_what_remembers(model, options):
    engine = model.engine()
    request = engine.add(prompt(0), max_new_tokens=4, **options)
    with pytest.raises(TwigVLMError, match=f"request {request}: has logits processors that two"):
        engine.fork(request, None)
    request = engine.add(prompt(0), max_new_tokens=4, stopping_criteria=[lambda ids, scores: False])
    with pytest.raises(TwigVLMError, match=f"request {request}: has stopping criteria that two"):
        engine.fork(request, None)
    harmless = engine.add(prompt(0), max_new_tokens=4, suppress_tokens=[5])
    engine.fork(harmless, None)


@pytest.mark.parametrize("name", ["visionzip", "mustdrop"])
def test_a_fork_that_needs_vision_says_which_request_to_fork(model, name):
    engine = model.engine()
    request = engine.add(prompt(0), max_new_tokens=4)
    with pytest.raises(TwigVLMError, match=r"ranks by the vision tower; add the request with that pruner"):
        engine.fork(request, make_pruner(name), 8)


def test_an_engine_takes_no_streamer_and_returns_no_dict(model):
    engine = model.engine()
    for name, value in (("streamer", TextStreamer(None)), ("return_dict_in_generate", True)):
        with pytest.raises(TwigVLMError, match=f"{name}: an engine gives tokens by its events"):
            engine.add(prompt(0), max_new_tokens=4, **{name: value})
    assert not engine.busy


def test_the_twigs_own_pruning_has_a_name_and_keeps_its_options(model):
    options = {"keep": 5, "final_wipe": 4, "max_new_tokens": 6}
    plain, named = (model.generate(**prompt(0), **options, **name) for name in ({}, {"pruner": "twig"}))
    assert torch.equal(plain, named)


def test_without_a_twig_nothing_asks_it():
    plain = TwigVLM.without_twig(tiny_llava(), trunk_layers=2)
    with pytest.raises(TwigVLMError, match=r"no trained twig to rank visual tokens; name another method with pruner"):
        plain.generate(**prompt(0), retain=10, max_new_tokens=2)
    for way in ("chain", "tree", "auto"):
        for call in (
            lambda way=way: plain.generate(**prompt(0), speculate=way),
            lambda way=way: plain.engine(speculate=way),
        ):
            with pytest.raises(TwigVLMError, match=f"speculate='{way}': this model has no twig that could draft"):
                call()
    ranking = TwigPruner(TwigAttention(), trunk_layers=2, final_wipe=4)
    with pytest.raises(TwigVLMError, match="pruner: ranks by a twig, but this model has none"):
        plain.generate(**prompt(0), pruner=ranking, retain=10, max_new_tokens=2)


def test_what_is_no_twig_is_not_saved_as_one(tmp_path):
    with pytest.raises(TwigVLMError, match="this model has no twig"):
        TwigVLM.without_twig(tiny_llava()).save_pretrained(tmp_path / "twig")
    assert not (tmp_path / "twig").exists()
