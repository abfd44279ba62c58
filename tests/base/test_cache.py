"""KVCache against plain tensors, one for each row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.kv.cache import KVCache

SLOTS = 2
operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 7)),
        st.tuples(st.just("truncate"), st.integers(0, 9)),
        st.tuples(st.just("keep"), st.integers(0, 2**16)),
        st.tuples(st.just("select"), st.integers(0, 2**16)),
    ),
    max_size=20,
)


@given(operations=operations, reserve=st.integers(0, 5), rows=st.integers(1, 3), seed=st.integers(0, 9))
def test_holds_what_plain_tensors_hold(operations, reserve, rows, seed):
    cache = KVCache(SLOTS, reserve)
    random = torch.Generator().manual_seed(seed)
    plain = [[torch.zeros(2, 0, 4) for _ in range(rows)] for _ in range(SLOTS)]
    for name, number in operations:
        for slot in range(SLOTS):
            old = plain[slot]
            if name == "update":
                new = torch.randint(99, (len(old), 2, number + slot, 4), generator=random).float()
                places = cache.place(slot, new[:, 0, :, 0].long())
                keys, values = cache.update(new, -new, slot)
                plain[slot] = old = [torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)]
                for row, expected in enumerate(old):
                    length = expected.shape[1]
                    assert torch.equal(keys[row, :, :length], expected)
                    assert torch.equal(values[row, :, :length], -expected)
                    assert torch.equal(places[row, :length], expected[0, :, 0].long())
                assert keys.shape[2] == values.shape[2] == places.shape[1] == max(row.shape[1] for row in old)
            elif name == "truncate":
                lengths = [number + row for row in range(len(old))]
                cache.truncate(slot, slot + 1, lengths)
                plain[slot] = [row[:, :length] for row, length in zip(old, lengths, strict=True)]
            elif (
                name == "keep"
            ):  # of the last up to eight tokens keep those at the bits of the number, other bits a row
                added = min(number % 9, *(row.shape[1] for row in old), 8)
                kept = [[place for place in range(added) if number >> (place + row) & 1] for row in range(len(old))]
                cache.keep(slot, slot + 1, added, kept)
                starts = [row.shape[1] - added for row in old]
                plain[slot] = [
                    row[:, [*range(start), *(start + place for place in places)]]
                    for row, start, places in zip(old, starts, kept, strict=True)
                ]
        if name == "select":
            chosen = [row for row in range(len(plain[0])) if number >> row & 1] or [0]
            cache.select(chosen)
            plain = [[slot[row] for row in chosen] for slot in plain]
        for slot in range(SLOTS):
            if cache.keys[slot] is not None:
                assert cache.lengths[slot] == tuple(row.shape[1] for row in plain[slot])
    for slot in range(SLOTS):
        if cache.keys[slot] is not None:
            for row, expected in enumerate(plain[slot]):
                assert torch.equal(cache.held(slot)[0][row, :, : expected.shape[1]], expected)


def test_a_decoding_step_copies_nothing_else():
    cache = KVCache(1, reserve=4)
    cache.update(torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4), 0)
    before = cache.keys[0].data_ptr()
    for _ in range(4):
        cache.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), 0)
    assert cache.keys[0].data_ptr() == before


def test_keeping_the_first_few_copies_nothing():
    cache = KVCache(2, reserve=4)
    for layer in range(2):
        cache.update(torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4), layer)
    before = cache.keys[0]._version
    cache.keep(0, 2, 4, [[0, 1, 2], [0]])
    assert cache.lengths == [(5, 3), (5, 3)]
    assert cache.keys[0]._version == before
    cache.keep(0, 1, 3, [[0, 2], [0]])
    assert cache.lengths == [(4, 1), (5, 3)]
    assert cache.keys[0]._version > before


def test_what_no_row_has_written_is_no_nan():
    """A mask hides it, but zero times NaN is NaN."""
    cache = KVCache(1, reserve=4)
    cache.update(torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 2), 0)
    cache.truncate(0, 1, (3, 1))
    keys, values = cache.update(torch.ones(2, 1, 4, 2), torch.ones(2, 1, 4, 2), 0)
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_an_empty_layer_has_nothing_to_read():
    with pytest.raises(IndexError, match="layer 1"):
        KVCache(2, 1).held(1)


def test_a_batch_borrows_what_one_row_holds():
    one, many = KVCache(2, 1), KVCache(2, 1)
    for layer in range(2):
        keys = torch.randn(1, 2, 5, 4)
        if layer:
            one.place(layer, torch.arange(5)[None])
        one.update(keys, -keys, layer)
    one.keep(0, 2, 2, [[]])
    for layer in range(2):
        many.borrow(one, layer, 3)
        assert torch.equal(many.held(layer)[1], one.held(layer)[1].expand(3, -1, -1, -1))
    assert many.places[0] is None
    assert many.place(1, torch.full((3, 1), 9)).tolist() == [[0, 1, 2, 9]] * 3
