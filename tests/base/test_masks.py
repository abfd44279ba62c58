"""Masks against their definition: a token sees itself and what came before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.base.masks import CausalMasks, PaddedMasks, TreeMasks, additive, causal_mask, padded_causal_mask, placed
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
    mask = CausalMasks(attention, rows, columns, torch.float32, CPU, single)(queries, prefix + queries)
    if (queries == 1 and not single) or (attention == "sdpa" and prefix == 0):
        assert mask is None
        return
    expected = causal_mask(queries, prefix + queries)
    if attention == "eager":
        expected = torch.zeros(expected.shape).masked_fill(~expected, torch.finfo(torch.float32).min)
    assert torch.equal(mask, expected[None, None])


def test_flash_attention_needs_no_mask():
    assert CausalMasks("flash_attention_2", 4, 9, torch.float32, CPU)(3, 9) is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nodes_see_the_whole_prefix_of_any_length_and_their_ancestors(attention):
    ancestors = torch.tensor([[True, True, False, False], [True, False, False, True]])
    masks = TreeMasks(attention, ancestors, torch.bfloat16)
    for prefix in (0, 1, 7):
        expected = torch.cat((torch.ones(2, prefix, dtype=torch.bool), ancestors), dim=1)
        if attention == "eager":
            expected = additive(expected, torch.bfloat16)
        assert torch.equal(masks(2, prefix + 4), expected[None, None])


def test_flash_attention_takes_no_tree():
    with pytest.raises(TwigVLMError, match="load the base with 'sdpa' or 'eager', or use speculate='chain'"):
        TreeMasks("flash_attention_2", torch.ones(1, 1, dtype=torch.bool), torch.float32)


@pytest.mark.parametrize("attention", ["flex_attention", "paged|sdpa"])
def test_unknown_attention_is_refused(attention):
    with pytest.raises(TwigVLMError, match="attn_implementation="):
        CausalMasks(attention, 1, 1, torch.float32, CPU)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3))
def test_padding_is_hidden_from_all_but_itself(rows):
    mask = padded_causal_mask(torch.tensor(rows))
    for row, allowed in enumerate(rows):
        for query in range(5):
            for key in range(5):
                assert mask[row, 0, query, key] == (key == query or (key < query and allowed[key]))


def test_padded_masks_by_attention():
    padding = torch.tensor([[0, 1, 1]])
    assert PaddedMasks("flash_attention_2", padding, torch.float32)(3, 3) is padding
    assert torch.equal(PaddedMasks("sdpa", padding, torch.float32)(3, 3), padded_causal_mask(padding))
    expected = additive(padded_causal_mask(padding), torch.float32)
    assert torch.equal(PaddedMasks("eager", padding, torch.float32)(3, 3), expected)


@st.composite
def pruned(draw):
    """Places of the tokens that are left of a sequence, how far each sees, and a window."""
    places = sorted(draw(st.sets(st.integers(0, 30), min_size=2, max_size=12)))
    reach = [place + draw(st.integers(0, 4)) for place in places]
    return places, reach, draw(st.integers(1, 12)), draw(st.integers(1, len(places)))


@given(pruned(), st.sampled_from(["eager", "sdpa"]), st.sampled_from(["none", "bool", "additive"]))
def test_distances_are_those_of_the_unpruned_sequence(case, attention, given_as):
    places, reach, window, queries = case
    start = len(places) - queries
    base = causal_mask(queries, len(places))[None, None]
    mask = {"none": None, "bool": base, "additive": additive(base, torch.float32)}[given_as]
    keys, far = torch.tensor([places]), torch.tensor([reach])[:, start:]
    got = placed(mask, attention, torch.float32, keys[:, start:], keys, far, window)
    for row, place in enumerate(places[start:]):
        for column, other in enumerate(places):
            seen = place - window < other <= max(place, reach[start + row])
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
