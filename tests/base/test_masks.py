"""Masks against their definition: a token sees itself and what came before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.base.masks import CausalMasks, TreeMasks, additive, causal_mask, placed
from twigvlm.errors import TwigVLMError

CPU = torch.device("cpu")


@given(prefix=st.integers(0, 12), queries=st.integers(1, 8))
def test_causal_mask_by_definition(prefix, queries):
    mask = causal_mask(queries, prefix + queries)
    for query in range(queries):
        for key in range(prefix + queries):
            assert mask[query, key] == (key <= prefix + query)


@given(
    prefix=st.integers(0, 20),
    queries=st.integers(1, 9),
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    attention=st.sampled_from(["eager", "sdpa"]),
    single=st.booleans(),
)
def test_the_table_gives_the_same_masks(prefix, queries, rows, columns, attention, single):
    mask = CausalMasks(attention, rows, columns, torch.float32, CPU, single)(queries, (prefix,))
    if (queries == 1 and not single) or (attention == "sdpa" and prefix == 0):
        assert mask is None
        return
    expected = causal_mask(queries, prefix + queries)
    if attention == "eager":
        expected = torch.zeros(expected.shape).masked_fill(~expected, torch.finfo(torch.float32).min)
    assert torch.equal(mask, expected[None, None])


def test_flash_attention_needs_no_mask():
    assert CausalMasks("flash_attention_2", 4, 9, torch.float32, CPU)(3, (6, 6)) is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nodes_see_the_whole_prefix_of_any_length_and_their_ancestors(attention):
    ancestors = torch.tensor([[[True, True, False, False], [True, False, False, True]]])
    masks = TreeMasks(attention, ancestors, torch.bfloat16)
    for prefix in (0, 1, 7):
        expected = torch.cat((torch.ones(1, 2, prefix, dtype=torch.bool), ancestors), dim=2)
        if attention == "eager":
            expected = additive(expected, torch.bfloat16)
        assert torch.equal(masks(2, (prefix + 2,)), expected[:, None])  # two of the nodes are in the cache already


def test_flash_attention_takes_no_tree():
    with pytest.raises(
        TwigVLMError, match="token trees: 'flash_attention_2' takes no mask; load the base with 'sdpa' or 'eager'"
    ):
        TreeMasks("flash_attention_2", torch.ones(1, 1, 1, dtype=torch.bool), torch.float32)


@pytest.mark.parametrize("attention", ["flex_attention", "paged|sdpa"])
def test_unknown_attention_is_refused(attention):
    with pytest.raises(TwigVLMError, match="attn_implementation="):
        CausalMasks(attention, 1, 1, torch.float32, CPU)


def _allowed(mask, attention):
    return mask if attention == "sdpa" else mask == 0


@given(st.lists(st.integers(0, 9), min_size=2, max_size=4), st.integers(1, 5), st.sampled_from(["eager", "sdpa"]))
def test_rows_of_different_lengths_see_their_own_tokens_and_no_others(held, queries, attention):
    mask = CausalMasks(attention, 5, 20, torch.float32, CPU)(queries, tuple(held))
    if mask is None:
        assert len(set(held)) == 1
        return
    for row, length in enumerate(held):
        for query in range(queries):
            for key in range(max(held) + queries):
                seen = _allowed(mask[row % len(mask), 0, query, key], attention)
                assert seen == (key <= length + query)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 2**16))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_trees_stand_behind_what_each_row_held_before(attention, before, queries, older, seed):
    nodes = older + queries
    ancestors = torch.rand(len(before), queries, nodes, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = TreeMasks(attention, ancestors, torch.float32)(queries, tuple(length + older for length in before))
    assert mask.shape == (len(before), 1, queries, max(before) + nodes)
    for row, length in enumerate(before):
        got = _allowed(mask[row, 0], attention)
        assert got[:, :length].all()
        assert torch.equal(got[:, length : length + nodes], ancestors[row])
        assert not got[:, length + nodes :].any()


def test_flash_attention_takes_no_rows_of_different_lengths():
    with pytest.raises(TwigVLMError, match="a batch of prompts: 'flash_attention_2' takes no mask"):
        CausalMasks("flash_attention_2", 4, 9, torch.float32, CPU)(1, (2, 3))


@st.composite
def pruned(draw):
    """Places of the tokens that are left of a sequence, how far each sees, and a window."""
    places = sorted(draw(st.sets(st.integers(0, 30), min_size=2, max_size=12)))
    attends_until = [place + draw(st.integers(0, 4)) for place in places]
    return places, attends_until, draw(st.integers(1, 12)), draw(st.integers(1, len(places)))


@given(pruned(), st.sampled_from(["eager", "sdpa"]), st.sampled_from(["none", "bool", "additive"]))
def test_distances_are_those_of_the_unpruned_sequence(case, attention, given_as):
    places, attends_until, window, queries = case
    start = len(places) - queries
    base = causal_mask(queries, len(places))[None, None]
    mask = {"none": None, "bool": base, "additive": additive(base, torch.float32)}[given_as]
    keys, far = torch.tensor([places]), torch.tensor([attends_until])[:, start:]
    got = placed(mask, attention, torch.float32, keys[:, start:], keys, far, window)
    for row, place in enumerate(places[start:]):
        for column, other in enumerate(places):
            seen = place - window < other <= max(place, attends_until[start + row])
            assert (got[0, 0, row, column] == (0 if attention == "eager" else True)) == seen


def test_an_explicit_mask_stays_closed():
    """A tree's branches do not see each other, whatever their places."""
    tree = torch.eye(3, dtype=torch.bool)[None, None]
    places = torch.tensor([[5, 6, 6]])
    assert torch.equal(placed(tree, "sdpa", torch.float32, places, places, None, 9), tree)


def test_flash_attention_measures_windows_otherwise():
    places = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(TwigVLMError, match="attn_implementation='flash_attention_2': measures sliding windows"):
        placed(None, "flash_attention_2", torch.float32, places, places, None, 4)
