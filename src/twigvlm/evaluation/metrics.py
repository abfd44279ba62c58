"""The metrics of acceleration (the paper's §5.1), with their uncertainty. Pure functions."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
"""One number per sample."""
FEWEST = 10
"""Smallest number of samples for an interval: with fewer, a percentile interval covers far less than its level says."""


def relative_accuracy(scores: Sequence[float] | Column, base: Sequence[float] | Column) -> float:
    """RelAcc: accuracy with acceleration divided by the base's accuracy on the same samples; nan if the latter is 0.

    Args:
        scores: score of each sample with acceleration, from 0 (wrong) to 1 (right).
        base: score of each sample of the base alone.
    """
    _same_length(scores, base)
    mean = float(np.mean(base))
    return float(np.mean(scores)) / mean if mean else float("nan")


def speeds(tokens: Sequence[float] | Column, seconds: Sequence[float] | Column) -> Column:
    """Tokens per second of each sample: generated tokens divided by seconds of prefill and decoding together."""
    _same_length(tokens, seconds)
    return np.asarray(tokens, dtype=np.float64) / np.asarray(seconds, dtype=np.float64)


def relative_speed(speed: Sequence[float] | Column, base: Sequence[float] | Column) -> float:
    """RelSpd: the ratio of tokens per second of each sample to the base's, averaged over samples."""
    _same_length(speed, base)
    return float(np.mean(np.asarray(speed, dtype=np.float64) / np.asarray(base, dtype=np.float64)))


def median_ratio(one: Sequence[float] | Column, other: Sequence[float] | Column) -> float:
    """Median of one / other over the samples that have both values; nan if no sample has."""
    _same_length(one, other)
    ratios = np.asarray(one, dtype=np.float64) / np.asarray(other, dtype=np.float64)
    known = ratios[~np.isnan(ratios)]
    return float(np.median(known)) if len(known) else float("nan")


def acceptance_rate(drafted: Sequence[int], accepted: Sequence[int]) -> float:
    """TokAR: accepted tokens divided by drafted tokens, over all steps together; nan if nothing was drafted."""
    _same_length(drafted, accepted)
    total = sum(drafted)
    return sum(accepted) / total if total else float("nan")


def mean_accepted_length(accepted: Sequence[int]) -> float:
    """Mean number of accepted drafted tokens per step of the base; nan without steps."""
    return sum(accepted) / len(accepted) if len(accepted) else float("nan")


def overlap(present: set[str], named: set[str]) -> tuple[int, int, int]:
    """Counts (found, present, named). From their sums follow recall = found / present and precision = found / named."""
    return len(present & named), len(present), len(named)


def bootstrap_interval(
    statistic: Callable[..., float],
    *columns: Sequence[float] | Column,
    groups: Sequence[object] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of samples (Efron's bootstrap).

    Each resample takes the same drawn samples from every column, so that values measured on one sample stay together, and the
    interval of a ratio is a paired one. Samples of one group, such as questions about one picture, are drawn together.

    Args:
        statistic: function of the columns.
        columns: columns of equal length, one entry per sample.
        groups: the group of each sample; None: each sample is a group of its own.
        resamples: number of resamples.
        seed: seed of the random draws.

    Returns:
        (low, high). Both are nan if there are fewer than `FEWEST` groups, or if the statistic is nan in 2.5 % of the
        resamples or more: a nan could lie anywhere, so it counts as a value above the interval.
    """
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    for array in arrays[1:]:
        _same_length(arrays[0], array)
    if groups is None:
        groups = range(len(arrays[0]))
    _same_length(arrays[0], groups)
    together: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        together.setdefault(group, []).append(row)
    members = list(together.values())
    if len(members) < FEWEST:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = rng.integers(len(members), size=len(members))
        rows = [row for group in drawn.tolist() for row in members[group]]
        values.append(statistic(*(array[rows] for array in arrays)))
    undefined = np.isnan(values)
    if undefined.mean() >= 0.025 - 1e-9:
        return float("nan"), float("nan")
    low, high = np.quantile(np.where(undefined, np.inf, values), (0.025, 0.975))
    return float(low), float(high)


def _same_length(one: Sequence[object] | Column, other: Sequence[object] | Column) -> None:
    if len(one) != len(other):
        raise ValueError(f"columns of {len(one)} and {len(other)} samples: must be of the same samples")
