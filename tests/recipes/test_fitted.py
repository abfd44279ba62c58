"""Budgets fitted to the question."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.sapling.fitted import calibrate, choose

BUDGETS = (40.0, 64.0, 104.0)
rows = st.lists(
    st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3).map(sorted), min_size=1, max_size=20
)  # shares that ascend with the budget


def test_more_is_kept_where_the_scores_are_spread_out():
    concentrated, spread = (0.9, 0.95, 0.99), (0.4, 0.6, 0.8)
    assert choose([concentrated, spread], 0.6) == [0, 1]
    assert choose([concentrated, spread], 0.999) == [2, 2]


@given(rows, st.floats(45, 100))
@settings(max_examples=60, deadline=None)
def test_the_average_is_not_exceeded_and_could_not_be_nearer(covered, average):
    share = calibrate(covered, BUDGETS, average)
    spent = np.mean([BUDGETS[n] for n in choose(covered, share)])
    assert spent <= average
    larger = [one for row in covered for one in row if one > share]
    if larger:
        assert np.mean([BUDGETS[n] for n in choose(covered, min(larger))]) > average
