"""Prompt lookup against plain Python over lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.batch import NO_TOKEN, RowState
from twigvlm.speculation.lookup import Lookup, continuations

rows = st.lists(st.integers(NO_TOKEN, 3), min_size=1, max_size=12)


def plain(ids, ngram, count):
    """What followed the longest suffix that stands somewhere before, its newest occurrence."""
    for size in range(min(ngram, len(ids)), 0, -1):
        suffix = ids[-size:]
        for start in range(len(ids) - 1, size - 1, -1):
            if ids[start - size : start] == suffix and NO_TOKEN not in suffix:
                found = [ids[start + place % (len(ids) - start)] for place in range(count)]
                return found[: found.index(NO_TOKEN)] if NO_TOKEN in found else found
    return []


def padded(texts, extra=0):
    width = max(map(len, texts)) + extra
    return torch.tensor([[*text, *[2] * (width - len(text))] for text in texts])


@settings(max_examples=200)
@given(st.lists(rows, min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_the_newest_occurrence_of_the_most_tokens_goes_on(texts, ngram, count, extra):
    found = continuations(padded(texts, extra), torch.tensor([len(text) for text in texts]), ngram, count)
    for text, row in zip(texts, found.tolist(), strict=True):
        expected = plain(text, ngram, count)
        assert row == expected + [NO_TOKEN] * (count - len(expected))


def drafts(text, prompt, limit=50, ends=(), static=False, **options):
    """The tokens that are drafted after a prompt and an answer, and the number of nodes of the pass."""
    count = len(text) - prompt
    numbers = (torch.tensor([number]) for number in (text[-1], count, limit, prompt, prompt))
    state = RowState(*numbers, torch.tensor([list(ends) or [NO_TOKEN]]), padded([text], 2))
    nodes = Lookup(SpeculationConfig("lookup", **options), static).start(state)
    assert nodes.parents.tolist() == [[max(0, place - 1) for place in range(nodes.tokens.shape[1])]]
    assert nodes.depths.tolist() == [list(range(nodes.tokens.shape[1]))]
    return nodes.tokens[nodes.valid].tolist(), nodes.tokens.shape[1]


TEXT = [5, 6, 7, 8, 9, 4, 5, 6]


def test_a_draft_ends_where_an_answer_would():
    assert drafts(TEXT, 5, draft_length=3) == ([6, 7, 8, 9], 4)
    assert drafts(TEXT, 5, draft_length=9) == ([6, 7, 8, 9, 4, 5, 6, 7, 8, 9], 10)  # the text repeats itself
    assert drafts(TEXT, 5, ends=[8]) == ([6, 7, 8], 3)
    assert drafts(TEXT, 5, limit=5) == ([6, 7], 2)  # two tokens are left, the second one is the base's
    assert drafts(TEXT, 5, limit=4) == ([6], 1)
    assert drafts([5, 6, 7, 1], 4) == ([1], 1)


def test_without_a_read_drafts_are_padded():
    assert drafts(TEXT, 5, ends=[8], static=True) == ([6, 7, 8], 6)
    assert drafts([5, 6, 7, 1], 4, static=True, draft_length=3) == ([1], 4)


def test_images_are_not_drafted():
    assert drafts([5, 6, NO_TOKEN, NO_TOKEN, 5], 5) == ([5, 6], 2)
    assert drafts([NO_TOKEN, NO_TOKEN, 5, 6, 7, 5], 5, draft_length=2) == ([5, 6, 7], 3)
