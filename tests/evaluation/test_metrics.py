import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.evaluation.metrics import (
    FEWEST,
    acceptance_rate,
    bootstrap_interval,
    mean_accepted_length,
    overlap,
    relative_accuracy,
    relative_speed,
    speeds,
)

positive = st.floats(0.01, 100)
rows = st.lists(st.tuples(positive, positive), min_size=1, max_size=30)
many = st.lists(st.tuples(positive, positive), min_size=FEWEST, max_size=30)


def test_relative_accuracy():
    assert relative_accuracy([1, 0, 1, 0], [1, 1, 1, 1]) == 0.5
    assert relative_accuracy([1, 1], [1, 0]) == 2.0  # pruning may help
    assert math.isnan(relative_accuracy([1], [0]))
    with pytest.raises(ValueError, match="same samples"):
        relative_accuracy([1], [1, 1])


def test_speed_is_averaged_over_samples_not_pooled():
    fast, base = speeds([10, 10], [1, 4]), speeds([10, 10], [2, 4])
    assert fast.tolist() == [10, 2.5]
    assert relative_speed(fast, base) == 1.5  # pooled it would be 1.2


@given(rows, positive)
def test_relative_figures_do_not_depend_on_units(pairs, unit):
    ours, base = map(list, zip(*pairs, strict=True))
    assert relative_speed(base, base) == pytest.approx(1)
    assert relative_accuracy(base, base) == pytest.approx(1)
    scaled = [unit * value for value in ours], [unit * value for value in base]
    assert relative_speed(*scaled) == pytest.approx(relative_speed(ours, base))
    assert relative_accuracy(*scaled) == pytest.approx(relative_accuracy(ours, base))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted), max_size=20))
def test_drafts(steps):
    accepted, drafted = [low for low, _ in steps], [high for _, high in steps]
    rate, length = acceptance_rate(drafted, accepted), mean_accepted_length(accepted)
    assert math.isnan(rate) == (sum(drafted) == 0)
    assert math.isnan(length) == (not steps)
    if sum(drafted):
        assert 0 <= rate <= 1
        assert rate * sum(drafted) == pytest.approx(length * len(steps))


def test_overlap():
    found, present, named = overlap({"dog", "cat", "bat"}, {"dog", "cow"})
    assert (found, present, named) == (1, 3, 2)


@given(many, st.integers(0, 5))
def test_an_interval_is_seeded_and_lies_within_what_was_seen(pairs, seed):
    ours, base = map(list, zip(*pairs, strict=True))
    low, high = bootstrap_interval(relative_speed, ours, base, resamples=50, seed=seed)
    assert (low, high) == bootstrap_interval(relative_speed, ours, base, resamples=50, seed=seed)
    ratios = [one / other for one, other in pairs]
    assert min(ratios) * (1 - 1e-9) <= low <= high <= max(ratios) * (1 + 1e-9)


def test_an_interval_is_paired():
    rng = np.random.default_rng(0)
    base = rng.uniform(1, 100, 40)
    assert bootstrap_interval(relative_accuracy, 0.9 * base, base) == pytest.approx((0.9, 0.9))
    low, high = bootstrap_interval(relative_accuracy, rng.permutation(base), base)
    assert high - low > 0.1


def test_an_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        sample = rng.normal(3, 1, 60)
        low, high = bootstrap_interval(np.mean, sample, resamples=200, seed=seed)
        covered += low <= 3 <= high
    assert 86 <= covered <= 99


def test_samples_that_belong_together_are_drawn_together():
    """Four copies of each sample say no more than one."""
    sample = np.random.default_rng(2).normal(3, 1, 60)
    groups = [number for number in range(60) for _ in range(4)]
    alone = bootstrap_interval(np.mean, sample)
    assert bootstrap_interval(np.mean, sample.repeat(4), groups=groups) == pytest.approx(alone)
    low, high = bootstrap_interval(np.mean, sample.repeat(4))
    assert high - low < 0.6 * (alone[1] - alone[0])


def test_resamples_without_a_figure_do_not_shorten_an_interval():
    """Where the base is right once among 12, a third of the resamples leave that one out, and have no RelAcc."""
    once = [1.0] + [0.0] * 11
    assert all(map(math.isnan, bootstrap_interval(relative_accuracy, once, once)))

    sample = np.random.default_rng(3).normal(3, 1, 60)
    rng = np.random.default_rng(4)
    rare = float(np.quantile([rng.choice(sample, 60).mean() for _ in range(2000)], 0.01))

    def interval(there):
        return bootstrap_interval(lambda drawn: drawn.mean() if drawn.mean() > rare else there, sample)

    assert interval(float("nan")) == interval(1e9)
    assert interval(float("nan")) != interval(rare)


def test_a_small_sample_has_no_interval():
    assert all(map(math.isnan, bootstrap_interval(relative_accuracy, [1.0] * (FEWEST - 1), [1.0] * (FEWEST - 1))))
    assert not any(map(math.isnan, bootstrap_interval(relative_accuracy, [1.0] * FEWEST, [1.0] * FEWEST)))
    assert all(map(math.isnan, bootstrap_interval(relative_accuracy, [], [])))
    assert all(map(math.isnan, bootstrap_interval(relative_accuracy, [0, 1], [0, 0])))
    assert all(map(math.isnan, bootstrap_interval(relative_accuracy, [1.0] * FEWEST, [0.0] * FEWEST)))
    with pytest.raises(ValueError, match="same samples"):
        bootstrap_interval(relative_accuracy, [1], [1, 2])
