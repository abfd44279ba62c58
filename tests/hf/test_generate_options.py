"""Options of the base's `generate` act as they do there, under pruning and speculation too."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from tests.batches import batched
from tests.tiny import prompt
from twigvlm import TwigVLMError

NEW = 14


def all_ways(model, inputs, options):
    """The base's answer, and ours without pruning: plain, and speculating both ways."""
    return (
        model.model.generate(**inputs, **options()),
        model.generate(**inputs, **options()),
        model.generate(**inputs, **options(), speculate="chain", draft_threshold=0.0),
        model.generate(**inputs, **options(), speculate="tree", tree_nodes=20),
    )


class Recording(LogitsProcessor):
    """Has a memory: forbids the token that it chose two calls before, and remembers every call."""

    def __init__(self):
        self.calls = []
        self.best = []

    def __call__(self, input_ids, scores):
        self.calls.append(input_ids.tolist())
        if len(self.best) >= 2:
            scores[:, self.best[-2]] = -float("inf")
        self.best.append(int(scores.argmax()))
        return scores


class StopAfter(StoppingCriteria):
    """Stops at the n-th call."""

    def __init__(self, calls):
        self.left = calls
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        self.seen.append(input_ids.tolist())
        return torch.full((len(input_ids),), self.left <= 0)


class Streamed(BaseStreamer):
    def __init__(self):
        self.puts = []
        self.ended = 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[int(i)] for i in range(2, 90)]},
        {"suppress_tokens": list(range(2, 60))},
        {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1] * 7 + 3) % 97, int(ids[-1] + 1) % 97]},
        {"min_new_tokens": 6, "eos_token_id": list(range(50)), "pad_token_id": 0},
        {"eos_token_id": list(range(0, 100, 4)), "pad_token_id": 0},
        {"eos_token_id": 5, "pad_token_id": 0, "forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 5, "pad_token_id": 0},
        {"sequence_bias": {(7,): 3.0}},
        {"begin_suppress_tokens": list(range(50))},
        {"renormalize_logits": True},
    ],
    ids=lambda options: next(iter(options)),
)
@settings(max_examples=4)
@given(seed=st.integers(0, 100))
def test_built_in_processors(model, options, seed):
    base, plain, chain, tree = all_ways(model, prompt(seed), lambda: {"max_new_tokens": NEW, **options})
    assert plain.tolist() == base.tolist()
    assert chain.tolist() == base.tolist()
    assert tree.tolist() == base.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 6, "eos_token_id": list(range(70)), "pad_token_id": 0},
        {"eos_token_id": 5, "pad_token_id": 0, "forced_eos_token_id": 5},
        {"exponential_decay_length_penalty": (2, 4.0), "eos_token_id": 5, "pad_token_id": 0},
        {"begin_suppress_tokens": list(range(70))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_built_in_processors_count_the_tokens_of_a_row_alone(model, options):
    rows = [prompt(1, 3, 4), prompt(2, 12, 9)]
    options = {"max_new_tokens": NEW, **options}
    alone = [model.generate(**row, **options)[0, row["input_ids"].shape[1] :].tolist() for row in rows]
    without = [model.generate(**row, max_new_tokens=NEW)[0, row["input_ids"].shape[1] :].tolist() for row in rows]
    assert alone[0] != without[0], "the option matters in the row that gets padding"
    batch = batched(rows)
    for way in ({}, {"speculate": "chain", "draft_threshold": 0.0}, {"speculate": "tree", "tree_nodes": 20}):
        got = model.generate(**batch, **options, **way)[:, batch["input_ids"].shape[1] :].tolist()
        assert [row[: len(answer)] for row, answer in zip(got, alone, strict=True)] == alone


def test_a_streamer_takes_one_answer(model):
    with pytest.raises(TwigVLMError, match="streamer: takes one answer, not 2"):
        model.generate(**batched([prompt(1), prompt(2)]), max_new_tokens=2, streamer=Streamed())


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"draft_length": 8}, "speculate by 'chain'"),
        ({"speculate": "chain", "tree_nodes": 9}, "speculate by 'tree'"),
        ({"speculate": "auto", "tree_depth": 2}, "speculate by 'tree'"),
        ({"speculate": "chain", "tree_width": 3}, "speculate by 'tree' or 'auto'"),
    ],
)
def test_an_option_that_does_not_apply_is_an_error(model, options, remedy):
    with pytest.raises(TwigVLMError, match=f"does not apply to speculate=.*{remedy}"):
        model.generate(**prompt(), max_new_tokens=2, **options)


def test_the_options_above_change_answers(model):
    plain = model.generate(**prompt(), max_new_tokens=NEW).tolist()
    for options in (
        {"repetition_penalty": 1.7},
        {"suppress_tokens": list(range(2, 60))},
        {"sequence_bias": {(7,): 3.0}},
    ):
        assert model.generate(**prompt(), max_new_tokens=NEW, speculate="chain", **options).tolist() != plain


def test_processors_with_a_memory_are_called_as_in_plain_generate(model):
    made = []

    def options():
        made.append(Recording())
        return {"max_new_tokens": NEW, "logits_processor": LogitsProcessorList([made[-1]])}

    base, plain, chain, tree = all_ways(model, prompt(), options)
    assert plain.tolist() == chain.tolist() == tree.tolist() == base.tolist()
    assert made[1].calls == made[2].calls == made[3].calls == made[0].calls
    assert len(made[0].calls) == NEW


@pytest.mark.parametrize("calls", [1, 2, 5, 9, 50])
def test_stopping_criteria_are_asked_after_every_token(model, calls):
    made = []

    def options():
        made.append(StopAfter(calls))
        return {"max_new_tokens": NEW, "stopping_criteria": StoppingCriteriaList([made[-1]])}

    base, plain, chain, tree = all_ways(model, prompt(), options)
    assert plain.tolist() == chain.tolist() == tree.tolist() == base.tolist()
    assert made[1].seen == made[2].seen == made[3].seen == made[0].seen


def test_streamers_get_what_plain_generate_gives_them(model):
    made = []

    def options():
        made.append(Streamed())
        return {"max_new_tokens": NEW, "streamer": made[-1]}

    all_ways(model, prompt(), options)
    assert made[1].puts == made[2].puts == made[3].puts == made[0].puts
    assert [streamed.ended for streamed in made] == [1, 1, 1, 1]
    assert len(made[0].puts) == 1 + NEW
    pruned, streamed = {"keep": 3, "speculate": "chain"}, Streamed()
    answer = model.generate(**prompt(), **pruned, max_new_tokens=NEW, streamer=streamed)
    assert [token for (token,) in streamed.puts[1:]] == answer[0, -NEW:].tolist()


def test_stop_strings(model):
    class Tokenizer:
        """Spells token i as the i-th of a hundred two-letter words."""

        def get_vocab(self):
            return {chr(97 + i // 10) + chr(107 + i % 10): i for i in range(100)}

        def __len__(self):
            return 100

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

        def __call__(self, text, **kwargs):
            return {"input_ids": [text]}

        def _convert_id_to_token(self, token):
            return token

    tokenizer = Tokenizer()
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    whole = model.generate(**prompt(), max_new_tokens=NEW)
    stop = words[int(whole[0, -NEW + 5])]
    base, plain, chain, tree = all_ways(
        model, prompt(), lambda: {"max_new_tokens": NEW, "stop_strings": [stop], "tokenizer": tokenizer}
    )
    assert plain.tolist() == chain.tolist() == tree.tolist() == base.tolist()
    assert base.shape[1] < whole.shape[1]


@pytest.mark.parametrize("copied", [False, True], ids=["as default", "as argument"])
@pytest.mark.parametrize("cache", [{"cache_implementation": "hybrid"}, {"use_cache": False}])
def test_what_a_checkpoint_s_config_asks_of_a_cache_and_of_texts_can_be_left_out(model, monkeypatch, cache, copied):
    expected = model.generate(**prompt(), max_new_tokens=NEW).tolist()
    monkeypatch.setattr(model.model, "generation_config", GenerationConfig(pad_token_id=0, stop_strings=["x"], **cache))
    given = {"generation_config": GenerationConfig(pad_token_id=0, **cache)} if copied else {}
    assert model.generate(**prompt(), max_new_tokens=NEW, stop_strings=None, **given).tolist() == expected
    with pytest.raises(TwigVLMError, match=rf"{next(iter(cache))}=.*leave it out"):
        model.generate(**prompt(), max_new_tokens=NEW, stop_strings=None, **cache)


def test_beams_that_a_checkpoint_s_config_asks_for_are_refused_or_left_out(model, monkeypatch):
    expected = model.generate(**prompt(), max_new_tokens=NEW).tolist()
    monkeypatch.setattr(model.model, "generation_config", GenerationConfig(pad_token_id=0, num_beams=3))
    for config in ({}, {"generation_config": GenerationConfig(pad_token_id=0)}):
        with pytest.raises(TwigVLMError, match=r"num_beams=3: .*pass num_beams=1"):
            model.generate(**prompt(), max_new_tokens=NEW, streamer=TextStreamer(None), **config)
    assert model.generate(**prompt(), max_new_tokens=NEW, num_beams=1).tolist() == expected


def test_max_time_stops(model):
    answer = model.generate(**prompt(), max_new_tokens=60, max_time=0.0)
    assert answer.shape[1] == prompt()["input_ids"].shape[1] + 1


def test_generation_config_is_merged_as_in_plain_generate(model):
    defaults = model.model.generation_config
    config = GenerationConfig(max_new_tokens=6, repetition_penalty=1.5, pad_token_id=0)
    base, plain, chain, tree = all_ways(model, prompt(), lambda: {"generation_config": config})
    assert plain.tolist() == chain.tolist() == tree.tolist() == base.tolist()
    model.model.generation_config = GenerationConfig(max_new_tokens=4, eos_token_id=[3, 4], pad_token_id=0)
    try:
        base, plain, chain, tree = all_ways(model, prompt(), dict)
        assert plain.tolist() == chain.tolist() == tree.tolist() == base.tolist()
        assert base.shape[1] <= 25 + 4
        base, plain, chain, tree = all_ways(model, prompt(), lambda: {"max_new_tokens": 9, "eos_token_id": None})
        assert plain.tolist() == chain.tolist() == tree.tolist() == base.tolist()
    finally:
        model.model.generation_config = defaults


def test_max_length_counts_the_prompt(model):
    base, plain, chain, tree = all_ways(model, prompt(), lambda: {"max_length": 30})
    assert plain.tolist() == chain.tolist() == tree.tolist() == base.tolist()
    assert chain.shape[1] == 30


def test_timings_add_up(model):
    began = time.perf_counter()
    output = model.generate(**prompt(), max_new_tokens=NEW, keep=4, speculate="chain", return_dict_in_generate=True)
    whole = time.perf_counter() - began
    timings = output.timings
    assert min(timings.prefill, timings.draft, timings.verify) > 0
    assert timings.draft + timings.verify <= timings.decode
    assert timings.prefill + timings.decode <= whole
