"""Rotary helpers against transformers' own rotation."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from twigvlm.base.positions import rotate, select_rope, slice_rope


def _rope(tokens, width):
    half = torch.outer(torch.arange(tokens).float(), 0.3 ** torch.arange(width // 2))
    angles = torch.cat((half, half), dim=-1)[None]
    return angles.cos(), angles.sin()


def test_rotation_is_that_of_the_base():
    states, rope = torch.randn(2, 3, 7, 8), _rope(7, 8)
    expected, _ = apply_rotary_pos_emb(states, states, *rope)
    torch.testing.assert_close(rotate(states, *rope), expected)


def test_partial_rotation_leaves_the_rest():
    states, rope = torch.randn(1, 2, 5, 12), _rope(5, 8)
    rotated = rotate(states, *rope)
    assert torch.equal(rotated[..., 8:], states[..., 8:])
    torch.testing.assert_close(rotated[..., :8], rotate(states[..., :8], *rope))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
def test_selected_tokens_keep_their_positions(indices):
    cos, sin = _rope(10, 8)
    got = select_rope((cos, sin), torch.tensor([indices]))
    assert torch.equal(got[0][0], cos[0, indices])
    assert torch.equal(got[1][0], sin[0, indices])


def test_slices_are_views():
    cos, sin = _rope(10, 8)
    part = slice_rope((cos, sin), 2, 5)
    assert torch.equal(part[1], sin[:, 2:5])
    assert part[0].data_ptr() == cos[:, 2:].data_ptr()
