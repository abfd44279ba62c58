"""Processors and criteria of `generate` act on each row of a padded batch as they act on the row alone."""

import inspect

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import (
    AlternatingCodebooksLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    ConfidenceCriteria,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    TopKLogitsWarper,
    WatermarkingConfig,
    logits_process,
)

from tests.batches import batched
from tests.tiny import IMAGE_TOKEN, VOCABULARY, prompt, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.errors import TwigVLMError
from twigvlm.hf.processors import split_processors
from twigvlm.hf.stopping import split_criteria

NEW = 9
ALONE = [prompt(1, 2, 3), prompt(2, 7, 6), prompt(3, 4, 4)]
BATCH = batched(ALONE)
PADDED = BATCH["input_ids"]
PADDING = (BATCH["attention_mask"] == 0).sum(dim=1).tolist()
WIDTH = PADDED.shape[1]
ENDS = {"eos_token_id": [5, 6], "pad_token_id": 0}


@pytest.fixture(scope="module")
def hf_model():
    return tiny_llava(3)


def captured(hf_model, inputs, **options):
    """Ids, processors, criteria and the configuration that Hugging Face's `generate` hands to its loop."""
    found = []

    def loop(_, input_ids, logits_processor, stopping_criteria, generation_config, **__):
        found.append((input_ids, logits_processor, stopping_criteria, generation_config))
        return input_ids

    hf_model.generate(**inputs, custom_generate=loop, **{"max_new_tokens": NEW, "do_sample": False, **options})
    return found[0]


def lanes_of(hf_model, inputs=BATCH, padding=PADDING, **options):
    ids, processors, _, config = captured(hf_model, inputs, **options)
    return split_processors(processors, ids, padding, config)


def lanes_in_order(lanes):
    return [(stage.lane, [type(one) for one in stage.processors[0]]) for stage in lanes.stages]


def random_scores(rows, seed):
    scores = 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    scores[:, 20] = -torch.inf
    return scores


def new_tokens(count, seed):
    return torch.randint(2, 12, (1, count), generator=torch.Generator().manual_seed(seed))


def allowed(row, ids):
    return [10 * row + 2, 10 * row + int(ids[-1]) % 8 + 1]


OPTIONS = {
    "scores": [
        {"do_sample": True, "temperature": 0.6},
        {"do_sample": True, "top_k": 7},
        {"do_sample": True, "top_p": 0.6},
        {"do_sample": True, "top_h": 0.5},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "epsilon_cutoff": 0.01},
        {"do_sample": True, "eta_cutoff": 0.02},
        {"remove_invalid_values": True},
        {"renormalize_logits": True},
        {"suppress_tokens": [3, 4, 5]},
        {"bad_words_ids": [[3], [9]]},
        {"sequence_bias": {(7,): 3.0}},
    ],
    "rows": [
        {"sequence_bias": {(7,): 3.0, (3, 8): 4.0, (0, 3): 5.0}},
        {"bad_words_ids": [[3, 8], [9], [0, 4]]},
        {"encoder_repetition_penalty": 1.7},
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"min_length": WIDTH + 1, **ENDS},
        {"min_new_tokens": 4, **ENDS},
        {"prefix_allowed_tokens_fn": allowed},
        {"forced_bos_token_id": 4},
        {"forced_eos_token_id": 5, **ENDS},
        {"exponential_decay_length_penalty": (3, 1.5), **ENDS},
        {"begin_suppress_tokens": [3, 4, 5]},
        {"watermarking_config": WatermarkingConfig(bias=2.0, context_width=2)},
        {"watermarking_config": WatermarkingConfig(bias=2.0, seeding_scheme="selfhash")},
        {
            "watermarking_config": SynthIDTextWatermarkingConfig(
                ngram_len=3, keys=[654, 400, 836], context_history_size=4
            )
        },
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "forced_eos_token_id": 5, **ENDS},
    ],
}


@pytest.mark.parametrize(
    ("lane", "options"),
    [(lane, options) for lane, several in OPTIONS.items() for options in several],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_row_is_processed_as_if_alone(hf_model, lane, options):
    """In one row alone `prefix_allowed_tokens_fn` is told row 0, so that function is wrapped there."""
    lanes, together = lanes_of(hf_model, **options), lanes_of(hf_model, **options)
    assert not lanes.needs_lockstep
    assert lanes.needs_ids == (lane == "rows")
    changed = False
    # The prompt is repeated at first, which processors of n-grams look for.
    news = [torch.cat((one["input_ids"][:, :4], new_tokens(NEW, row)), dim=1) for row, one in enumerate(ALONE)]
    expected = {}
    for row, inputs in enumerate(ALONE):
        given = dict(options)
        if "prefix_allowed_tokens_fn" in options:
            given["prefix_allowed_tokens_fn"] = lambda _, ids, row=row: allowed(row, ids)
        ids, processors, *_ = captured(hf_model, inputs, **given)
        for count in range(NEW):
            so_far, scores = torch.cat((ids, news[row][:, :count]), dim=1), random_scores(1, 10 * count + row)
            expected[row, count] = processors(so_far, scores.clone())
            got = lanes.on_row(row, so_far, scores.clone())
            assert got.tolist() == expected[row, count].tolist()
            if lane == "scores":
                assert lanes.on_scores(scores.clone()).tolist() == got.tolist()
            changed |= got.tolist() != scores.tolist()
    assert changed or "forced_bos_token_id" in options  # that acts behind a single token
    for count in range(NEW):
        so_far = torch.cat((PADDED, torch.cat(news)[:, :count]), dim=1)
        scores = torch.cat([random_scores(1, 10 * count + row) for row in range(len(ALONE))])
        got = together.on_batch(so_far, scores, range(len(ALONE)))
        torch.testing.assert_close(got, torch.cat([expected[row, count] for row in range(len(ALONE))]))


def test_a_forced_first_token_comes_behind_a_prompt_of_one(hf_model):
    inputs = batched(
        [{"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}, ALONE[0]]
    )
    padding = [ALONE[0]["input_ids"].shape[1] - 1, 0]
    lanes = lanes_of(hf_model, inputs, padding, forced_bos_token_id=4)
    assert lanes.on_row(0, torch.tensor([[7]]), random_scores(1, 0)).argmax() == 4


def test_several_answers_of_each_prompt(hf_model):
    options = {"num_return_sequences": 2, "do_sample": True, "temperature": 1.0, "top_k": 0}
    options |= {"encoder_repetition_penalty": 1.7, "encoder_no_repeat_ngram_size": 1, "repetition_penalty": 1.3}
    padding = [count for count in PADDING for _ in range(2)]
    lanes = lanes_of(hf_model, padding=padding, **options)
    for row in range(2 * len(ALONE)):
        ids, processors, *_ = captured(hf_model, ALONE[row // 2], **{**options, "num_return_sequences": 1})
        scores = random_scores(1, row)
        assert lanes.on_row(row, ids, scores.clone()).tolist() == processors(ids, scores).tolist()


@pytest.mark.parametrize(
    ("in_batch", "alone"),
    [
        (
            lambda: RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=WIDTH),
            lambda ids: RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=ids.shape[1]),
        ),
        (
            lambda: RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor(PADDING) + 3),
            lambda ids: RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=3),
        ),
        (lambda: RepetitionPenaltyLogitsProcessor(1.5), lambda ids: RepetitionPenaltyLogitsProcessor(1.5)),
        (
            lambda: EncoderRepetitionPenaltyLogitsProcessor(1.5, torch.tensor([[0, 8, 9]])),
            lambda ids: EncoderRepetitionPenaltyLogitsProcessor(1.5, torch.tensor([[0, 8, 9]])),
        ),
        (
            lambda: EncoderNoRepeatNGramLogitsProcessor(1, torch.tensor([0, 8, 9])),
            lambda ids: EncoderNoRepeatNGramLogitsProcessor(1, torch.tensor([0, 8, 9])),
        ),
    ],
    ids=["ignored-prompt", "ignored-lengths", "nothing-ignored", "other-text", "other-ngrams"],
)
def test_hugging_faces_processors_made_by_the_user(hf_model, in_batch, alone):
    lanes = lanes_of(hf_model, logits_processor=[in_batch()])
    for row, inputs in enumerate(ALONE):
        ids = torch.cat((inputs["input_ids"], new_tokens(4, row)), dim=1)
        scores = random_scores(1, row)
        expected = alone(inputs["input_ids"])(ids, scores.clone())
        assert lanes.on_row(row, ids, scores).tolist() == expected.tolist()


def test_every_processor_of_transformers_is_tried_above_or_left_to_the_contract(hf_model):
    """A class that is new in transformers gets Hugging Face's contract; it is named here once somebody has looked at it."""
    by_the_contract = {
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "DiaEOSDelayPatternLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "WhisperNoSpeechDetection",
        "WhisperTimeStampLogitsProcessor",
    }
    several = [options for lane in OPTIONS.values() for options in lane]
    tried = {type(one).__name__ for options in several for one in captured(hf_model, BATCH, **options)[1]}
    classes = [
        one for _, one in inspect.getmembers(logits_process, inspect.isclass) if issubclass(one, LogitsProcessor)
    ]
    assert {one.__name__ for one in classes} - {"LogitsProcessor"} - tried <= by_the_contract
    lanes = lanes_of(
        hf_model, guidance_scale=2.0, logits_processor=[AlternatingCodebooksLogitsProcessor(WIDTH, 20, 20)]
    )
    assert [lane for lane, _ in lanes_in_order(lanes)] == ["batch"]


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


def test_no_processors_at_all(hf_model):
    lanes = lanes_of(hf_model)
    scores = random_scores(4, 0)
    assert not lanes.stages
    assert lanes.on_scores(scores.clone()).tolist() == scores.tolist()
    assert not lanes.needs_ids


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
    lanes = split_processors(logits_processor, input_ids, padding, generation_config)
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


def stopping_of(hf_model, inputs=BATCH, padding=PADDING, **options):
    ids, _, criteria, _ = captured(hf_model, inputs, **options)
    return split_criteria(criteria, ids, padding)


def test_plain_numbers_end_answers(hf_model):
    stopping = stopping_of(hf_model, eos_token_id=[5, 6], pad_token_id=0)
    assert (stopping.max_new_tokens, stopping.eos_token_ids) == (NEW, {5, 6})
    assert not stopping.needs_ids
    assert not stopping.needs_lockstep
    shorter = stopping_of(hf_model, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(WIDTH + 4)]))
    assert shorter.max_new_tokens == 4
    assert stopping_of(hf_model, stopping_criteria=[MaxLengthCriteria(3)]).max_new_tokens == 1


def test_stop_strings_end_a_row_by_its_ids_alone(hf_model):
    tokenizer = tiny_processor().tokenizer
    padding_token = tokenizer.decode([0])
    first = tokenizer.decode(ALONE[0]["input_ids"][0, :1])
    strings = StopStringCriteria(tokenizer, ["ab", padding_token + first])
    stopping = stopping_of(hf_model, stopping_criteria=[strings], max_time=1e6)
    assert stopping.needs_ids
    assert not stopping.needs_lockstep
    a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
    ids = torch.cat((PADDED, torch.tensor([[a, b], [b, a], [a, c]])), dim=1)
    assert stopping.on_batch(ids, [0, 1, 2]).tolist() == [True, False, False]
    assert [stopping.on_row(row, ids[row : row + 1, PADDING[row] :]) for row in range(3)] == [True, False, False]
    assert not stopping.on_row(0, ALONE[0]["input_ids"][:, :1])
    assert not stopping.on_batch(PADDED[:, : PADDING[0] + 1], [0])[0]


def test_time_ends_every_row(hf_model):
    stopping = stopping_of(hf_model, max_time=-1.0)
    assert stopping.on_row(1, ALONE[1]["input_ids"])
    assert stopping.on_batch(PADDED, [0, 1, 2]).tolist() == [True] * 3


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


def test_negative_prompts_come_one_for_each_answer(hf_model):
    with pytest.raises(TwigVLMError, match="negative_prompt_ids: has 1 rows for 3 answers; give one for each"):
        lanes_of(hf_model, guidance_scale=2.0, negative_prompt_ids=torch.tensor([[5, 6]]))


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


def test_a_prefix_function_that_allows_nothing_is_named(hf_model):
    lanes = lanes_of(hf_model, prefix_allowed_tokens_fn=lambda row, ids: [])
    with pytest.raises(TwigVLMError, match="prefix_allowed_tokens_fn: allows no token in row 1"):
        lanes.on_row(1, ALONE[1]["input_ids"], random_scores(1, 0))


def test_criteria_that_cannot_be_had_are_refused(hf_model):
    with pytest.raises(TwigVLMError, match="ConfidenceCriteria: needs scores"):
        stopping_of(hf_model, stopping_criteria=[ConfidenceCriteria(0.5)])
    with pytest.raises(TwigVLMError, match="max_new_tokens is not set"):
        split_criteria(StoppingCriteriaList(), PADDED, PADDING)
