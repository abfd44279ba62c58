"""LayeredCache against plain tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.base.cache import LayeredCache

operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(0, 2), st.integers(1, 7)),
        st.tuples(st.just("truncate"), st.integers(0, 2), st.integers(0, 9)),
        st.tuples(st.just("keep"), st.integers(0, 2), st.integers(0, 2**16)),
    ),
    max_size=20,
)


@given(operations=operations, reserve=st.integers(0, 5))
def test_holds_what_plain_tensors_hold(operations, reserve):
    cache = LayeredCache(3, reserve)
    plain = [torch.zeros(1, 2, 0, 4) for _ in range(3)]
    for name, layer, number in operations:
        if name == "update":
            new = torch.randint(99, (1, 2, number, 4)).float()
            places = cache.place(layer, new[:, 0, :, 0].long())
            keys, values = cache.update(new, -new, layer)
            assert torch.equal(places, keys[:, 0, :, 0].long())
            plain[layer] = torch.cat((plain[layer], new), dim=2)
            assert torch.equal(keys, plain[layer])
            assert torch.equal(values, -plain[layer])
        elif name == "truncate":
            cache.truncate(layer, layer + 1, number)
            plain[layer] = plain[layer][:, :, :number]
        else:  # of the last up to eight tokens keep those at the bits of the number
            added = min(number % 9, plain[layer].shape[2])
            kept = [place for place in range(added) if number >> place & 1]
            cache.keep(layer, layer + 1, added, kept)
            before = plain[layer].shape[2] - added
            plain[layer] = plain[layer][:, :, [*range(before), *(before + place for place in kept)]]
        assert [cache.length(i) for i in range(3)] == [tensor.shape[2] for tensor in plain]
    for layer in range(3):
        if cache.keys[layer] is not None:
            assert torch.equal(cache.held(layer)[0], plain[layer])


def test_a_decoding_step_copies_nothing_else():
    cache = LayeredCache(1, reserve=4)
    cache.update(torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4), 0)
    before = cache.keys[0].data_ptr()
    for _ in range(4):
        cache.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), 0)
    assert cache.keys[0].data_ptr() == before


def test_keeping_the_first_few_copies_nothing():
    cache = LayeredCache(2, reserve=4)
    for layer in range(2):
        cache.update(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), layer)
    before = cache.keys[0]._version
    cache.keep(0, 2, 4, range(3))
    assert cache.lengths == [5, 5]
    assert cache.keys[0]._version == before
    cache.keep(0, 1, 3, [0, 2])
    assert cache.lengths == [4, 5]
    assert cache.keys[0]._version > before


def test_an_empty_layer_has_nothing_to_read():
    with pytest.raises(IndexError, match="layer 1"):
        LayeredCache(2, 1).held(1)


def test_a_batch_borrows_what_one_row_holds():
    one, many = LayeredCache(2, 1), LayeredCache(2, 1)
    for layer in range(2):
        keys = torch.randn(1, 2, 5, 4)
        if layer:
            one.place(layer, torch.arange(5)[None])
        one.update(keys, -keys, layer)
    one.keep(0, 2, 2, [])
    for layer in range(2):
        many.borrow(one, layer, 3)
        assert torch.equal(many.held(layer)[1], one.held(layer)[1].expand(3, -1, -1, -1))
    assert many.places[0] is None
    assert many.place(1, torch.full((3, 1), 9)).tolist() == [[0, 1, 2, 9]] * 3
