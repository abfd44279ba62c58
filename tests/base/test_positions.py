"""Rotary helpers against transformers' own rotation."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from twigvlm.base.token_inputs import TokenInputs, expand_rows, rotate, select_tokens, slice_tokens


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


def _whole(tokens=10):
    cos, sin = _rope(tokens, 8)
    places = torch.arange(tokens)[None]
    return TokenInputs(cos, sin, ("a", "b"), places, places + 1, (torch.randn(1, tokens, 6), torch.randn(1, tokens, 6)))


def _parts(rope):
    return [rope.cos, rope.sin, rope.places, rope.attends_until, *rope.deepstack]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
def test_selected_tokens_keep_all_that_goes_with_them(indices):
    rope = _whole()
    got = select_tokens(rope, torch.tensor([indices]))
    assert got.kinds == rope.kinds
    for part, whole in zip(_parts(got), _parts(rope), strict=True):
        assert torch.equal(part[0], whole[0, indices])


def test_slices_are_views():
    rope = _whole()
    got = slice_tokens(rope, 2, 5)
    for part, whole in zip(_parts(got), _parts(rope), strict=True):
        assert torch.equal(part, whole[:, 2:5])
        assert part.data_ptr() == whole[:, 2:].data_ptr()


def test_rows_of_a_batch_share_what_goes_with_them():
    rope = _whole()
    for part, whole in zip(_parts(expand_rows(rope, 3)), _parts(rope), strict=True):
        assert torch.equal(part, torch.cat([whole] * 3))


def test_kinds_of_layers_have_embeddings_of_their_own():
    rope = _whole()
    assert torch.equal(rope.of("a")[0], rope.cos[..., :4])
    assert torch.equal(rope.of("b")[1], rope.sin[..., 4:])
    assert rope._replace(kinds=()).of("a")[0] is rope.cos
