"""KVCache against plain tensors, one for each row and layer."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.kv.cache import KVCache

CPU = torch.device("cpu")
LAYERS = 5
WINDOWED = (0, 3)
"""Layers that ask for the positions of what they hold, as those with a sliding window do."""
KEYS, VALUES = (2, 3), (2, 4)
"""Heads and their sizes."""

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a row holds in a layer: keys and values [heads, tokens, size], positions [tokens]."""


def _empty() -> list[Layer]:
    keys, values = (torch.zeros(heads, 0, size) for heads, size in (KEYS, VALUES))
    return [(keys, values, torch.zeros(0, dtype=torch.long)) for _ in range(LAYERS)]


def _cut(layer: Layer, tokens: list[int]) -> Layer:
    return layer[0][:, tokens], layer[1][:, tokens], layer[2][tokens]


some_layers = st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)).filter(lambda ends: ends[0] < ends[1])
ranges = st.one_of(st.just((0, LAYERS)), some_layers)


class PlainRows(RuleBasedStateMachine):
    """Every row is what it alone has been told; some are broken: their keys and values are NaN."""

    @initialize(boundaries=st.sets(st.integers(0, LAYERS)), reserve=st.integers(0, 4))
    def begin(self, boundaries, reserve):
        self.cache = KVCache(LAYERS, boundaries, reserve, CPU)
        self.rows: list[list[Layer]] = []
        self.broken: list[bool] = []
        self.random = torch.Generator().manual_seed(0)

    def some(self, data):
        """Neighbouring rows, often all of them."""
        if data.draw(st.booleans()):
            return slice(0, len(self.rows))
        start = data.draw(st.integers(0, len(self.rows) - 1))
        return slice(start, data.draw(st.integers(start + 1, len(self.rows))))

    def held(self, layer, row):
        return len(self.rows[row][layer][2])

    @precondition(lambda self: len(self.rows) < 6)
    @rule(broken=st.lists(st.booleans(), min_size=1, max_size=3))
    def claim(self, broken):
        claimed = self.cache.claim(len(broken))
        assert claimed == slice(len(self.rows), len(self.rows) + len(broken))
        self.rows += [_empty() for _ in broken]
        self.broken += broken

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data):
        """The last row takes the place of the one that goes."""
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.cache.release(row)
        for of_rows in (self.rows, self.broken):
            of_rows[row] = of_rows[-1]
            of_rows.pop()

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), layers=ranges, passes=st.lists(st.integers(1, 4), min_size=1, max_size=2))
    def append(self, data, layers, passes):
        """One or two passes, of which some tokens may stay and others not."""
        rows = self.some(data)
        view = self.cache.view(rows)
        for tokens in passes:
            self.run(data, view, layers, tokens)
        if data.draw(st.booleans()):
            self.commit(data, rows, layers, sum(passes))

    def run(self, data, view, layers, tokens):
        (start, stop), chosen = layers, range(view.rows.start, view.rows.stop)
        positions = torch.randint(99, (len(chosen), tokens), generator=self.random)
        middle = data.draw(st.integers(start, stop))  # a pass may be of several ranges of layers
        for first, last in ((start, middle), (middle, stop)):
            for layer in range(first, last):
                self.pass_through(layer, view, chosen, positions)
            if last > first:
                view.advance(first, last, tokens)

    def pass_through(self, layer, view, chosen, positions):
        tokens = positions.shape[1]
        before = [self.held(layer, row) for row in chosen]
        assert view.get_seq_length(layer) == max(before)
        if layer in WINDOWED:
            known = view.positions(layer, positions)
        keys, values = (
            torch.randn(len(chosen), heads, tokens, size, generator=self.random) for heads, size in (KEYS, VALUES)
        )
        for number, row in enumerate(chosen):
            if self.broken[row]:
                keys[number] = values[number] = float("nan")
            old = self.rows[row][layer]
            new_keys, new_values = (
                torch.cat(pair, dim=1) for pair in ((old[0], keys[number]), (old[1], values[number]))
            )
            self.rows[row][layer] = new_keys, new_values, torch.cat((old[2], positions[number]))
        got = view.update(keys, values, layer)
        assert [states.shape[2] for states in got] == [max(before) + tokens] * 2
        self.compare(layer, chosen, got)
        if layer in WINDOWED:
            for row, of_row in zip(chosen, known, strict=True):
                assert torch.equal(of_row[: self.held(layer, row)], self.rows[row][layer][2])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), layers=ranges)
    def set_lengths(self, data, layers):
        rows, chosen_layers = self.some(data), range(*layers)
        chosen = range(rows.start, rows.stop)
        shortest = [min(self.held(layer, row) for layer in chosen_layers) for row in chosen]
        lengths = [data.draw(st.integers(0, length)) for length in shortest]
        self.cache.set_lengths(*layers, rows, lengths)
        for row, length in zip(chosen, lengths, strict=True):
            for layer in chosen_layers:
                self.rows[row][layer] = _cut(self.rows[row][layer], list(range(length)))

    def commit(self, data, rows, layers, appended):
        """Of the last tokens some stay: those of a path through a tree, or the first ones."""
        chosen, chosen_layers = range(rows.start, rows.stop), range(*layers)
        places = st.permutations(range(appended)) if data.draw(st.booleans()) else st.just(list(range(appended)))
        paths = [data.draw(places)[: data.draw(st.integers(0, appended))] for _ in chosen]
        in_order = all(path == list(range(len(path))) for path in paths)
        longest = max(map(len, paths))
        kept = torch.tensor([[*path, *[0] * (longest - len(path))] for path in paths], dtype=torch.long)
        counts = np.array([len(path) for path in paths])
        self.cache.commit(*layers, rows, appended, counts, torch.tensor(counts), None if in_order else kept)
        for row, path in zip(chosen, paths, strict=True):
            for layer in chosen_layers:
                before = self.held(layer, row) - appended
                tokens = [*range(before), *(before + place for place in path)]
                self.rows[row][layer] = _cut(self.rows[row][layer], tokens)

    @rule(layer=st.integers(0, LAYERS))
    def split(self, layer):
        self.cache.split(layer)

    def compare(self, layer, chosen, got):
        for row, keys, values in zip(chosen, *got, strict=True):
            length = self.held(layer, row)
            for held, expected in zip((keys, values), self.rows[row][layer][:2], strict=True):
                torch.testing.assert_close(held[:, :length], expected, rtol=0, atol=0, equal_nan=True)
                # A mask hides the rest, but zero times NaN is NaN.
                assert self.broken[row] or held.isfinite().all()

    @invariant()
    def holds_what_plain_rows_hold(self):
        assert self.cache.rows == len(self.rows)
        total, all_rows = 0, slice(0, len(self.rows))
        for layer in range(LAYERS) if self.rows else ():
            lengths = [self.held(layer, row) for row in range(len(self.rows))]
            total += sum(lengths) * sum(heads * size for heads, size in (KEYS, VALUES)) * 4
            assert self.cache.held(layer, all_rows).lengths.tolist() == lengths
            held = self.cache.held(layer, all_rows)
            assert held.lengths.tolist() == lengths
            assert (held.longest, held.equal) == (max(lengths), len(set(lengths)) == 1)
            if any(lengths):
                self.compare(layer, range(len(self.rows)), self.cache.contents(layer, all_rows))
        assert self.cache.allocated() >= total
        assert self.rows or not self.cache.allocated()


class TestPlainRows(PlainRows.TestCase):
    settings = settings(max_examples=40, stateful_step_count=25)


def _filled(cache, rows, tokens, layers=1):
    view = cache.view(rows)
    for layer in range(layers):
        states = torch.randn(rows.stop - rows.start, 2, tokens, 4)
        view.update(states, -states, layer)
    view.advance(0, layers, tokens)


def test_within_the_reserve_a_step_copies_nothing_else():
    cache = KVCache(1, (), 4, CPU)
    rows = cache.claim(2)
    _filled(cache, rows, 10)
    before = cache.contents(0, rows)[0].data_ptr()
    for _ in range(4):
        _filled(cache, rows, 1)
    assert cache.contents(0, rows)[0].data_ptr() == before


def test_what_layers_get_and_what_is_read_are_views():
    """Attention reads the buffer itself, whichever rows take part."""
    cache = KVCache(1, (), 8, CPU)
    _filled(cache, cache.claim(3), 5)
    rows = slice(1, 3)
    keys, _ = cache.view(rows).update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
    assert keys.data_ptr() == cache.contents(0, rows)[0].data_ptr()


def test_an_empty_layer_has_nothing_to_read():
    cache = KVCache(2, (), 1, CPU)
    rows = cache.claim(1)
    with pytest.raises(IndexError, match="layer 1 of the cache is empty"):
        cache.contents(1, rows)


@pytest.mark.parametrize("way", ["none", "chain"])
def test_a_broken_request_leaves_nothing_to_later_ones(way):
    """Its states are NaN, as those of a model that overflows; the later one takes its row beside a longer one."""
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2))
    longer, later, broken = prompt(1, after=40), prompt(2, after=3), prompt(3, after=30)
    broken["pixel_values"] = torch.full_like(broken["pixel_values"], float("nan"))
    engine = model.engine(max_rows=2, speculate=way)
    engine.add(longer, max_new_tokens=12)
    engine.add(broken, max_new_tokens=2)
    id = engine.add(later, max_new_tokens=8)
    answer: list[int] = []
    while events := engine.step():
        answer += [token for event in events if event.id == id for token in event.tokens]
    expected = model.generate(**later, max_new_tokens=8)
    assert answer == expected[0, later["input_ids"].shape[1] :].tolist()


def test_where_memory_runs_out_for_more_rows_the_others_keep_theirs(monkeypatch):
    cache = KVCache(2, (), 4, torch.device("cpu"))
    states = torch.randn(1, 2, 3, 8)
    view = cache.view(cache.claim(1))
    for layer in range(2):
        view.update(states, states + 1, layer)
    view.advance(0, 2, 3)
    join, calls = torch.cat, []

    def scarce(parts, *rest, **named):
        calls.append(parts)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return join(parts, *rest, **named)

    monkeypatch.setattr(torch, "cat", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        cache.claim(3)
    assert cache.rows == 1
    for row in (slice(1, 4), slice(4, 5)):
        assert cache.claim(row.stop - row.start) == row
        new = torch.randn(row.stop - row.start, 2, 9, 8)
        later = cache.view(row)
        for layer in range(2):
            torch.testing.assert_close(later.update(new, new, layer), (new, new))
        later.advance(0, 2, 9)
        torch.testing.assert_close(cache.contents(1, slice(0, 1)), (states, states + 1))
