"""States that the twig has not seen yet: rows join, get more of them, and leave."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.speculation.batch import Pending

WIDTH = 2
steps = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 3)),
        st.tuples(st.just("append"), st.integers(1, 3), st.integers(0, 2**16)),
        st.tuples(st.just("leave"), st.integers(0, 5)),
    ),
    max_size=12,
)


@given(st.integers(1, 3), steps)
def test_every_row_has_its_states_and_no_more(rows, steps):
    """Against a list for each row; no column stands beyond those of the row that has most."""
    like = torch.zeros(1, 1, WIDTH)
    pending, lists, number = Pending.none(rows, like), [[] for _ in range(rows)], 0
    for step, *values in steps:
        if step == "join":
            pending = pending.join(Pending.none(values[0], like))
            lists += [[] for _ in range(values[0])]
        elif step == "append":
            most, seed = values
            counts = np.random.default_rng(seed).integers(0, most + 1, len(lists))
            states = torch.arange(number, number + len(lists) * most).view(-1, most, 1).expand(-1, -1, WIDTH).float()
            number += len(lists) * most
            pending = pending.append(states, torch.from_numpy(counts), counts)
            for row, count in enumerate(counts):
                lists[row] += states[row, :count, 0].tolist()
        elif len(lists) > 1:
            row = values[0] % len(lists)
            pending = pending.leave(row)
            lists[row] = lists[-1]
            lists.pop()
        assert pending.on_host.tolist() == pending.counts.tolist() == [len(row) for row in lists]
        assert pending.states.shape[1] == max(map(len, lists))
        for row, expected in enumerate(lists):
            assert pending.states[row, : len(expected), 0].tolist() == expected
