"""Acceptance and the base's choices, as functions of plain lists and tensors."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.decoding.sampling import greedy_choices
from twigvlm.decoding.verify import accept

tokens = st.lists(st.integers(0, 3), max_size=6)


@given(tokens, tokens)
def test_the_accepted_prefix_is_the_longest_that_agrees(drafted, choices):
    choices = (choices + [9] * 7)[: len(drafted) + 1]
    accepted = accept(drafted, choices)
    assert drafted[:accepted] == choices[:accepted]
    assert accepted == len(drafted) or drafted[accepted] != choices[accepted]


@given(tokens, st.integers(0, 2**16))
def test_processors_see_each_position_once_and_none_beyond_the_first_difference(drafted, seed):
    logits = torch.randn(len(drafted) + 1, 5, generator=torch.Generator().manual_seed(seed))
    plain = greedy_choices(logits, drafted)
    assert plain == logits.argmax(dim=-1).tolist()
    prompt_ids, seen = torch.tensor([[7, 8]]), []

    def processor(ids, scores):
        seen.append(ids[0].tolist())
        assert scores.dtype == torch.float32
        return scores

    accepted = accept(drafted, plain)
    assert greedy_choices(logits, drafted, processor, prompt_ids) == plain[: accepted + 1]
    assert seen == [[7, 8, *drafted[:length]] for length in range(accepted + 1)]


def test_processors_work_on_a_copy():
    logits = torch.zeros(1, 3)
    assert greedy_choices(
        logits, [], lambda ids, scores: scores.add_(torch.tensor([0, 0, 1])), torch.tensor([[1]])
    ) == [2]
    assert torch.equal(logits, torch.zeros(1, 3))
