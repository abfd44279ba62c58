"""Processors and criteria of users, and guidance, are called as in `generate`: in its order, with the padded batch."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import (
    ClassifierFreeGuidanceLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
)

from tests.hf.lanes import (
    ALONE,
    BATCH,
    ENDS,
    NEW,
    PADDED,
    PADDING,
    WIDTH,
    lanes_in_order,
    lanes_of,
    new_tokens,
    random_scores,
    stopping_of,
)
from tests.tiny import IMAGE_TOKEN, VOCABULARY
from twigvlm.errors import TwigVLMError
from twigvlm.hf.processors import split_processors
from twigvlm.hf.stopping import split_criteria


class Doubling(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return 2 * scores


class WiderTopK(TopKLogitsWarper):
    """A user's class, whatever it is made from."""


def test_the_order_is_that_of_generate(hf_model):
    options = {"suppress_tokens": [3], "repetition_penalty": 1.5, "logits_processor": [Doubling(), WiderTopK(9)]}
    lanes = lanes_of(hf_model, **options, do_sample=True, temperature=0.5, top_k=4)
    assert [(lane, [one.__name__ for one in classes]) for lane, classes in lanes_in_order(lanes)] == [
        ("rows", ["RepetitionPenaltyLogitsProcessor"]),
        ("scores", ["SuppressTokensLogitsProcessor"]),
        ("batch", ["Doubling", "WiderTopK"]),
        ("scores", ["TemperatureLogitsWarper", "TopKLogitsWarper"]),
    ]
    assert lanes.needs_ids
    assert lanes.needs_lockstep


class Watching(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.tolist())
        return scores


def test_a_users_processor_sees_the_padding_of_a_single_prompt(hf_model):
    """Also a function for prefixes, in any batch: users count from the length of the prompts that they pass."""
    watching, told = Watching(), []

    def function(row, ids):
        told.append((row, ids.tolist()))
        return [4]

    inputs = {name: value[:1] for name, value in BATCH.items()}
    options = {"logits_processor": [watching], "prefix_allowed_tokens_fn": function}
    lanes = lanes_of(hf_model, inputs, PADDING[:1], **options)
    assert not lanes.needs_lockstep
    lanes.on_row(0, ALONE[0]["input_ids"], random_scores(1, 0))
    assert watching.seen == [PADDED[:1].tolist()]
    lanes = lanes_of(hf_model, prefix_allowed_tokens_fn=function)
    lanes.on_row(2, ALONE[2]["input_ids"], random_scores(1, 0))
    assert told == [(0, PADDED[0].tolist()), (2, PADDED[2].tolist())]


class Grammar(LogitsProcessor):
    """As xgrammar's: a matcher for each row made at the first call, tokens taken from the ids, scores changed in place."""

    def __init__(self, ends):
        self.ends = ends
        self.matchers = None

    def __call__(self, input_ids, scores):
        if self.matchers is None:
            self.matchers = [[] for _ in input_ids]
        else:
            assert len(self.matchers) == len(input_ids), "made for another batch"
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                if not self.ends & set(matcher):
                    assert not matcher or len(matcher) < NEW
                    matcher.append(token)
        for row, matcher in enumerate(self.matchers):
            parity = (len(matcher) + row) % 2
            scores[row, torch.arange(VOCABULARY) % 2 != parity] = -torch.inf
        return scores


class Banned(LogitsProcessor):
    """Banned ids for each row."""

    def __init__(self):
        self.ids = torch.tensor([[11, 72], [24, 60], [41, 33]])

    def __call__(self, input_ids, scores):
        return scores.scatter(1, self.ids, -torch.inf)


class Third(LogitsProcessor):
    """The third new token is 7, counted from the padded prompt."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] - WIDTH == 2:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, 7] = 0
        return scores


class Flags(StoppingCriteria):
    """A length for each row, counted from the padded prompt."""

    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return self.lengths <= input_ids.shape[1] - WIDTH


class All(StoppingCriteria):
    """One flag for all rows, as older criteria have it."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - WIDTH >= 6


def by_lanes(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """A plain loop without a cache: the whole batch advances by a token at a time."""
    mask = inputs["attention_mask"]
    padding, pad = (mask == 0).sum(dim=1).tolist(), generation_config.pad_token_id
    lanes = split_processors(logits_processor, input_ids, padding, generation_config, VOCABULARY)
    stopping = split_criteria(stopping_criteria, input_ids, padding)
    ids, unfinished = input_ids, list(range(len(input_ids)))
    while unfinished:
        mask = torch.cat((mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])), dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, pixel_values=BATCH["pixel_values"]
            )
        tokens = lanes.on_batch(ids, output.logits[:, -1].to(torch.float32, copy=True), unfinished).argmax(dim=-1)
        ids = torch.cat((ids, torch.full((len(ids), 1), pad)), dim=1)
        ids[unfinished, -1] = tokens[unfinished]
        ended = stopping.on_batch(ids, unfinished)
        if ids.shape[1] - input_ids.shape[1] == stopping.max_new_tokens:
            break
        unfinished = [row for row in unfinished if not ended[row] and int(ids[row, -1]) not in stopping.eos_token_ids]
    return ids


@pytest.mark.parametrize(
    "made",
    [
        lambda: {"logits_processor": [Grammar({9, 16})], "eos_token_id": [9, 16]},
        lambda: {"logits_processor": [Banned()]},
        lambda: {"logits_processor": [Third(), Banned()], "repetition_penalty": 1.3, "min_new_tokens": 5, **ENDS},
        lambda: {"guidance_scale": 1.7},
        lambda: {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[5, 6], [7, 8], [9, 4]])},
        lambda: {"stopping_criteria": [Flags(3, 9, 5)], **ENDS},  # without ends Hugging Face pads no row
        lambda: {"stopping_criteria": [All()], "logits_processor": [Third()], **ENDS},
    ],
    ids=["grammar", "banned", "third-and-banned", "guidance", "negative-prompts", "flags", "one-flag"],
)
def test_batches_get_the_contract_of_generate(hf_model, made):
    common = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE_TOKEN]}
    expected = hf_model.generate(**BATCH, **{**common, **made()})
    plain = hf_model.generate(**BATCH, **common)
    assert hf_model.generate(**BATCH, **{**common, **made()}, custom_generate=by_lanes).tolist() == expected.tolist()
    assert plain.tolist() != expected.tolist()


def test_a_grammar_has_matchers_for_rows_that_end_apart(hf_model):
    """The case above is worth something: rows end at several places."""
    ids = hf_model.generate(
        **BATCH, max_new_tokens=NEW, logits_processor=[Grammar({9, 16})], eos_token_id=[9, 16], pad_token_id=0
    )
    assert len({int((row[WIDTH:] != 0).sum()) for row in ids}) > 1


def test_a_users_criterion_gets_the_padded_batch(hf_model):
    assert stopping_of(hf_model, stopping_criteria=[All()]).needs_lockstep
    inputs = {name: value[:1] for name, value in BATCH.items()}
    stopping = stopping_of(hf_model, inputs, PADDING[:1], stopping_criteria=[Flags(2)])
    assert not stopping.needs_lockstep
    ids = ALONE[0]["input_ids"]
    assert [stopping.on_row(0, torch.cat((ids, new_tokens(count, 0)), dim=1)) for count in (1, 2)] == [False, True]


class ThreeArguments(LogitsProcessor):
    def __call__(self, input_ids, scores, **kwargs):
        return scores


@pytest.mark.parametrize(
    ("processors", "message"),
    [
        (lambda: [ThreeArguments()], r"ThreeArguments takes \(input_ids, scores, kwargs\)"),
        (lambda: ["greedy"], "str is not callable"),
        (lambda: [ClassifierFreeGuidanceLogitsProcessor(2.0)], "pass guidance_scale instead"),
        (
            lambda: [RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([1, 2]))],
            "prompt_ignore_length: has 2 lengths for 3 answers",
        ),
    ],
)
def test_what_generate_cannot_call_is_refused(hf_model, processors, message):
    with pytest.raises(TwigVLMError, match=message):
        lanes_of(hf_model, logits_processor=LogitsProcessorList(processors()))


class Returning(LogitsProcessor, StoppingCriteria):
    def __init__(self, value):
        self.value = value

    def __call__(self, input_ids, scores):
        return self.value


@pytest.mark.parametrize(
    "value", [None, torch.zeros(VOCABULARY), torch.zeros(1, VOCABULARY)], ids=["none", "1d", "one-row"]
)
def test_a_processor_that_returns_no_scores_is_named(hf_model, value):
    lanes = lanes_of(hf_model, logits_processor=[Returning(value)])
    with pytest.raises(TwigVLMError, match=r"Returning returned .*; return scores \(3, 100\)"):
        lanes.on_batch(PADDED, random_scores(3, 0), [0, 1, 2])


@pytest.mark.parametrize("value", [None, torch.zeros(3, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)])
def test_a_criterion_that_returns_no_flags_is_named(hf_model, value):
    stopping = stopping_of(hf_model, stopping_criteria=[Returning(value)])
    with pytest.raises(TwigVLMError, match=r"Returning returned .*; return a bool for each row, \(3,\)"):
        stopping.on_batch(PADDED, [0, 1, 2])
