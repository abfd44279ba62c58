"""Masks against their definition: a token sees itself and what came before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.base.masks import CausalMasks, TreeMasks, additive, causal_mask, mixed_length_mask, restrict
from twigvlm.errors import TwigVLMError
from twigvlm.kv.segments import Held

CPU = torch.device("cpu")
attentions = st.sampled_from(["eager", "sdpa"])
lengths = st.lists(st.integers(0, 9), min_size=1, max_size=4)


def _held(*lengths):
    return Held(max(lengths), len(set(lengths)) == 1, torch.tensor(lengths))


def _allowed(mask, attention):
    """A mask as the attention implementation reads it: True where a query sees a key."""
    if attention == "sdpa":
        assert mask.dtype == torch.bool
        return mask
    assert ((mask == 0) | (mask == torch.finfo(mask.dtype).min)).all()
    return mask == 0


@given(prefix=st.integers(0, 12), queries=st.integers(1, 8))
def test_causal_mask_by_definition(prefix, queries):
    mask = causal_mask(queries, prefix + queries)
    for query in range(queries):
        for key in range(prefix + queries):
            assert mask[query, key] == (key <= prefix + query)


@given(lengths, st.integers(1, 5))
def test_rows_of_different_lengths_see_their_own_tokens_and_no_others(held, queries):
    mask = mixed_length_mask(queries, _held(*held))
    assert mask.shape == (len(held), queries, max(held) + queries)
    for row, length in enumerate(held):
        for query in range(queries):
            for key in range(max(held) + queries):
                assert mask[row, query, key] == (key <= length + query)


@given(held=st.one_of(st.none(), lengths), queries=st.integers(1, 9), attention=attentions, single=st.booleans())
def test_the_attention_gets_a_mask_wherever_it_needs_one(held, queries, attention, single):
    """A single query sees everything, and SDPA's causal flag is right while a cache holds nothing."""
    masks = CausalMasks(attention, torch.bfloat16, CPU, single)
    mask = masks(queries, None if held is None else _held(*held))
    held = held or [0]
    if mask is None:
        assert len(set(held)) == 1
        assert (queries == 1 and not single) or (attention == "sdpa" and max(held) == 0)
        return
    assert attention == "sdpa" or mask.dtype == torch.bfloat16
    expected = mixed_length_mask(queries, _held(*held))[:, None]
    assert torch.equal(_allowed(mask, attention).expand_as(expected), expected)


def test_flash_attention_needs_no_mask():
    assert CausalMasks("flash_attention_2", torch.float32, CPU)(3, _held(6, 6)) is None


def test_flash_attention_takes_no_rows_of_different_lengths():
    with pytest.raises(TwigVLMError, match="a batch of prompts: 'flash_attention_2' takes no mask"):
        CausalMasks("flash_attention_2", torch.float32, CPU)(1, _held(2, 3))


@pytest.mark.parametrize("attention", ["flex_attention", "paged|sdpa"])
def test_unknown_attention_is_refused(attention):
    with pytest.raises(TwigVLMError, match="attn_implementation="):
        CausalMasks(attention, torch.float32, CPU)


@given(lengths, st.integers(1, 3), st.integers(0, 3), attentions, st.integers(0, 2**16))
def test_trees_stand_behind_what_each_row_held_before(before, queries, older, attention, seed):
    """Nodes see the whole prefix, however long, and their ancestors; some nodes are in the cache already."""
    nodes = older + queries
    ancestors = torch.rand(len(before), queries, nodes, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = TreeMasks(attention, ancestors, torch.bfloat16)(queries, _held(*(length + older for length in before)))
    assert mask.shape == (len(before), 1, queries, max(before) + nodes)
    for row, length in enumerate(before):
        got = _allowed(mask[row, 0], attention)
        assert got[:, :length].all()
        assert torch.equal(got[:, length : length + nodes], ancestors[row])
        assert not got[:, length + nodes :].any()


def test_flash_attention_takes_no_tree():
    with pytest.raises(
        TwigVLMError, match="token trees: 'flash_attention_2' takes no mask; load the base with 'sdpa' or 'eager'"
    ):
        TreeMasks("flash_attention_2", torch.ones(1, 1, 1, dtype=torch.bool), torch.float32)


@st.composite
def pruned(draw):
    """Rows of what is left of a sequence: the tokens' positions, and how far each sees; a window, how many are new.

    There is a window, or tokens see ahead, or both.
    """
    tokens = draw(st.integers(2, 8))
    rows = [
        sorted(draw(st.sets(st.integers(0, 20), min_size=tokens, max_size=tokens)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    until = [[position + draw(st.integers(0, 4)) for position in positions] for positions in rows]
    window, ahead = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    window = draw(st.integers(1, 12)) if window else None
    return torch.tensor(rows), torch.tensor(until), window, ahead, draw(st.integers(1, tokens))


@given(pruned(), attentions, st.sampled_from(["none", "bool", "additive"]))
def test_distances_are_those_of_the_unpruned_sequence(case, attention, given_as):
    keys, until, window, ahead, queries = case
    new, until = keys[:, -queries:], until[:, -queries:]
    causal = causal_mask(queries, keys.shape[1])[None, None]
    mask = {"none": None, "bool": causal, "additive": additive(causal, torch.float32)}[given_as]
    got = restrict(mask, attention, torch.float32, new, keys, until if ahead else None, window)
    allowed = _allowed(got, attention).expand(len(keys), 1, -1, -1)
    for row in range(len(keys)):
        for query, position in enumerate(new[row].tolist()):
            first = -1 if window is None else position - window
            last = max(position, int(until[row, query])) if ahead else position
            expected = [first < other <= last for other in keys[row].tolist()]
            assert allowed[row, 0, query].tolist() == expected


def test_without_a_window_positions_of_the_new_tokens_suffice():
    """What the cache holds is seen by all of them."""
    new, until = torch.tensor([[7, 8, 9]]), torch.tensor([[8, 8, 9]])
    causal = causal_mask(3, 6)[None, None]
    got = restrict(causal, "sdpa", torch.float32, new, new, until, None)
    assert got[0, 0].int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]


def test_an_explicit_mask_stays_closed():
    """A tree's branches do not see each other, whatever their positions."""
    tree = torch.eye(3, dtype=torch.bool)[None, None]
    positions = torch.tensor([[5, 6, 6]])
    assert torch.equal(restrict(tree, "sdpa", torch.float32, positions, positions, None, 9), tree)


def test_rows_of_different_lengths_in_a_window():
    """What stands behind a shorter row's tokens stays hidden, whatever position it had."""
    held, positions = _held(3, 1), torch.tensor([[0, 4, 5, 6], [5, 6, 7, 7]])
    causal = mixed_length_mask(1, held)[:, None]
    got = restrict(causal, "sdpa", torch.float32, torch.tensor([[6], [6]]), positions, None, 3)
    assert got[:, 0, 0].tolist() == [[False, True, True, True], [True, True, False, False]]


def test_flash_attention_measures_windows_otherwise():
    positions = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(TwigVLMError, match="attn_implementation='flash_attention_2': would measure sliding windows"):
        restrict(None, "flash_attention_2", torch.float32, positions, positions, None, 4)
