"""What ends an answer, be it a number, a text or the time, ends each row of a padded batch as it ends the row alone."""

import numpy as np
import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation import ConfidenceCriteria, MaxLengthCriteria, StopStringCriteria

from tests.hf.lanes import ALONE, NEW, PADDED, PADDING, WIDTH, stopping_of
from tests.tiny import prompt
from tests.tiny_processor import tiny_processor
from twigvlm.errors import TwigVLMError
from twigvlm.hf.stopping import split_criteria


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


@pytest.mark.parametrize("strings", ["", [""], ("",), {""}])
def test_an_empty_stop_string_ends_an_answer_at_once_as_in_the_base(model, strings):
    options = {"max_new_tokens": 6, "stop_strings": strings, "tokenizer": tiny_processor().tokenizer}
    answer = model.generate(**prompt(), **options)
    assert answer.shape[1] == prompt()["input_ids"].shape[1] + 1
    assert torch.equal(answer, model.model.generate(**prompt(), **options))


@pytest.mark.parametrize("flags", [np.bool_(True), np.array([True] * 3), torch.ones(3), torch.ones(1, dtype=torch.int)])
def test_flags_of_any_kind_of_number(hf_model, flags):
    stopping = stopping_of(hf_model, stopping_criteria=[lambda ids, scores: flags])
    assert stopping.on_batch(PADDED, [0, 1, 2]).tolist() == [True] * 3


def test_time_ends_every_row(hf_model):
    stopping = stopping_of(hf_model, max_time=-1.0)
    assert stopping.on_row(1, ALONE[1]["input_ids"])
    assert stopping.on_batch(PADDED, [0, 1, 2]).tolist() == [True] * 3


def test_criteria_that_cannot_be_had_are_refused(hf_model):
    with pytest.raises(TwigVLMError, match="ConfidenceCriteria: needs scores"):
        stopping_of(hf_model, stopping_criteria=[ConfidenceCriteria(0.5)])
    with pytest.raises(TwigVLMError, match="max_new_tokens is not set"):
        split_criteria(StoppingCriteriaList(), PADDED, PADDING)
