"""Per-token inputs against plain indexing, and rotary embeddings against transformers' own rotation."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from twigvlm.base.token_inputs import (
    TokenInputs,
    join_tokens,
    rotate,
    select_rows,
    select_tokens,
    slice_tokens,
)


def _rotary(tokens, width, rows=1):
    frequencies = 0.3 ** torch.arange(width // 2)
    half = (torch.arange(tokens) + 7.0 * torch.arange(rows)[:, None])[..., None] * frequencies
    angles = torch.cat((half, half), dim=-1)
    return angles.cos(), angles.sin()


def test_rotation_is_that_of_the_base():
    states, (cos, sin) = torch.randn(2, 3, 7, 8), _rotary(7, 8)
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin)
    torch.testing.assert_close(rotate(states, cos, sin), expected)


def test_partial_rotation_leaves_the_rest():
    states, (cos, sin) = torch.randn(1, 2, 5, 12), _rotary(5, 8)
    rotated = rotate(states, cos, sin)
    assert torch.equal(rotated[..., 8:], states[..., 8:])
    torch.testing.assert_close(rotated[..., :8], rotate(states[..., :8], cos, sin))


def _inputs(tokens=10, rows=1):
    positions = torch.arange(tokens) + 100 * torch.arange(rows)[:, None]
    deepstack = torch.randn(rows, tokens, 6), torch.randn(rows, tokens, 6)
    return TokenInputs(*_rotary(tokens, 8, rows), ("a", "b"), positions, positions + 1, deepstack)


def _plain(inputs):
    """Inputs of a base without sliding windows, bidirectional attention or deepstack."""
    return inputs._replace(positions=None, attends_until=None, deepstack=())


def _parts(inputs):
    return [inputs.cos, inputs.sin, inputs.positions, inputs.attends_until, *inputs.deepstack]


@given(
    st.integers(1, 6).flatmap(
        lambda kept: st.lists(
            st.lists(st.integers(0, 9), min_size=kept, max_size=kept, unique=True), min_size=1, max_size=3
        )
    )
)
def test_selected_tokens_keep_all_that_goes_with_them(indices):
    whole = _inputs(rows=len(indices))
    got = select_tokens(whole, torch.tensor(indices))
    assert got.kinds == whole.kinds
    for part, full in zip(_parts(got), _parts(whole), strict=True):
        for row, chosen in enumerate(indices):
            assert torch.equal(part[row], full[row, chosen])


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_selected_rows_keep_all_that_goes_with_them(rows):
    whole = _inputs(rows=4)
    got = select_rows(whole, torch.tensor(rows))
    assert got.kinds == whole.kinds
    for part, full in zip(_parts(got), _parts(whole), strict=True):
        assert torch.equal(part, full[rows])


def test_slices_are_views():
    whole = _inputs()
    got = slice_tokens(whole, 2, 5)
    for part, full in zip(_parts(got), _parts(whole), strict=True):
        assert torch.equal(part, full[:, 2:5])
        assert part.data_ptr() == full[:, 2:].data_ptr()


def test_what_a_base_does_not_have_stays_missing():
    whole = _plain(_inputs())
    for got in (
        select_tokens(whole, torch.tensor([[1, 2]])),
        select_rows(whole, torch.tensor([0])),
        slice_tokens(whole, 1, 3),
        join_tokens(whole, whole, torch.zeros(1, 10, dtype=torch.long)),
    ):
        assert (got.positions, got.attends_until, got.deepstack) == (None, None, ())


def test_new_tokens_behind_a_prompt_are_causal_and_have_no_visual_features():
    prompt, new = _inputs(rows=2), _plain(_inputs(3, rows=2))
    positions = torch.tensor([[10, 11, 12], [8, 9, 10]])
    got = join_tokens(prompt, new, positions)
    for part, full in zip(_parts(slice_tokens(got, 0, 10)), _parts(prompt), strict=True):
        assert torch.equal(part, full)
    behind = slice_tokens(got, 10, 13)
    assert torch.equal(behind.cos, new.cos)
    assert torch.equal(behind.sin, new.sin)
    assert torch.equal(behind.positions, positions)
    assert torch.equal(behind.attends_until, positions)  # each sees up to itself
    assert not any(features.any() for features in behind.deepstack)


def test_kinds_of_layers_have_embeddings_of_their_own():
    inputs = _inputs()
    assert torch.equal(inputs.rotary("a")[0], inputs.cos[..., :4])
    assert torch.equal(inputs.rotary("b")[1], inputs.sin[..., 4:])
    assert torch.equal(inputs._replace(kinds=()).rotary("a")[0], inputs.cos)
