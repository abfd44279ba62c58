"""Processors of `generate` act on each row of a padded batch as they act on the row alone."""

import inspect

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation import (
    AlternatingCodebooksLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    logits_process,
)

from tests.batches import batched
from tests.hf.lanes import (
    ALONE,
    BATCH,
    ENDS,
    NEW,
    PADDED,
    PADDING,
    WIDTH,
    captured,
    lanes_in_order,
    lanes_of,
    new_tokens,
    random_scores,
)
from twigvlm.errors import TwigVLMError


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


def test_no_processors_at_all(hf_model):
    lanes = lanes_of(hf_model)
    scores = random_scores(4, 0)
    assert not lanes.stages
    assert lanes.on_scores(scores.clone()).tolist() == scores.tolist()
    assert not lanes.needs_ids


def test_negative_prompts_come_one_for_each_answer(hf_model):
    with pytest.raises(TwigVLMError, match="negative_prompt_ids: has 1 rows for 3 answers; give one for each"):
        lanes_of(hf_model, guidance_scale=2.0, negative_prompt_ids=torch.tensor([[5, 6]]))


def test_a_prefix_function_that_allows_nothing_is_named(hf_model):
    lanes = lanes_of(hf_model, prefix_allowed_tokens_fn=lambda row, ids: [])
    with pytest.raises(TwigVLMError, match="prefix_allowed_tokens_fn: allows no token in row 1"):
        lanes.on_row(1, ALONE[1]["input_ids"], random_scores(1, 0))
