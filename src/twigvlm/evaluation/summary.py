"""Compute figures from raw records. Pure functions; `report` makes tables of the figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from twigvlm.evaluation.metrics import (
    acceptance_rate,
    bootstrap_interval,
    mean_accepted_length,
    relative_accuracy,
    relative_speed,
    speeds,
)
from twigvlm.evaluation.results_log import Record
from twigvlm.evaluation.variants import NONE

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Quality of answers, as shares from 0 to 1; nan if there is no answer of the kind."""

    exact: float
    """Share of right answers, descriptions excluded."""
    recall: float
    """Share of the objects in pictures that descriptions name."""
    precision: float
    """Share of the objects named by descriptions that are in the picture."""
    read: float
    """Share of the texts in pictures that descriptions quote correctly."""


def quality(scores: Sequence[int | list[int]]) -> Quality:
    """Quality of answers with these scores, from `accuracy.score`."""
    counts = [score for score in scores if isinstance(score, list)]
    found, present, named, read, written = (sum(score[i] for score in counts) for i in range(5))
    return Quality(
        exact=_mean([score for score in scores if not isinstance(score, list)]),
        recall=found / present if present else float("nan"),
        precision=found / named if named else float("nan"),
        read=read / written if written else float("nan"),
    )


@dataclass(frozen=True, kw_only=True)
class Accuracy(Quality):
    """Figures of one variant on all questions."""

    name: str
    """Name of the variant."""
    kept: float
    """R, mean over questions."""
    average: float
    """R̄, mean over questions."""
    ran: float
    """Visual tokens that refocusing ran through the pruned layers again, mean over questions."""
    again: float
    """Share of all decoding steps in which tokens were chosen again; nan if the method does not refocus, or if raw results of an
    older version lack it."""
    relative: float
    """RelAcc."""
    interval: Interval
    """95 % interval of RelAcc, by a paired bootstrap over pictures."""
    kinds: dict[str, tuple[int, float]]
    """Number of questions and exact match per kind."""


def accuracies(records: Sequence[Record]) -> list[Accuracy]:
    """Figures of every variant, in the order of the first record. RelAcc is relative to the variant without pruning.

    Args:
        records: records of `run_accuracy`.
    """
    short = [record for record in records if not isinstance(record["score"][NONE.name], list)]
    reference = [record["score"][NONE.name] for record in short]
    result = []
    for name in records[0]["score"]:
        column = [record["score"][name] for record in short]
        kinds: dict[str, list[int]] = {}
        for record, right in zip(short, column, strict=True):
            kinds.setdefault(record["kind"], []).append(right)
        result.append(
            Accuracy(
                **vars(quality([record["score"][name] for record in records])),
                name=name,
                kept=float(np.mean([record["kept"][name] for record in records])),
                average=float(np.mean([record["average"][name] for record in records])),
                ran=float(np.mean([record["ran"][name] for record in records])),
                again=_share_again(
                    [record.get("looks", {}).get(name) for record in records],
                    [record.get("steps", {}).get(name, 0) for record in records],
                ),
                relative=relative_accuracy(column, reference) if short else float("nan"),
                interval=bootstrap_interval(relative_accuracy, column, reference, groups=pictures(short)),
                kinds={kind: (len(rights), _mean(rights)) for kind, rights in sorted(kinds.items())},
            )
        )
    return result


@dataclass(frozen=True, kw_only=True)
class Speed(Quality):
    """Figures of one system on all prompts. Times are in seconds: medians over repeats, averaged over prompts."""

    name: str
    """Name of the system."""
    tokens: float
    """New tokens of an answer, mean over prompts."""
    speed: float
    """Tokens per second, prefill and decoding together; mean over prompts."""
    relative: float
    """RelSpd."""
    interval: Interval
    """95 % interval of RelSpd, by a paired bootstrap over pictures."""
    prefill: float
    """Time to the first token, vision included."""
    decode: float
    """Time of all further tokens."""
    draft: float
    """Part of `decode` that drafts; nan for the base's own `generate`."""
    verify: float
    """Part of `decode` that verifies; nan for the base's own `generate`."""
    relative_prefill: float
    """Prefill time of the baseline divided by this system's: above 1 is faster."""
    acceptance: float
    """TokAR."""
    accepted_length: float
    """Accepted tokens per step."""
    different: int | None
    """Number of prompts whose output differs from that of `System.same_as`; None: there is no such system."""
    ran: float
    """Visual tokens that refocusing ran through the pruned layers again, mean over prompts; nan if the system does not refocus,
    or if raw results of an older version lack it."""
    again: float
    """Share of all decoding steps in which tokens were chosen again; nan in the same cases."""


def faster(records: Sequence[Record], names: Sequence[str]) -> str:
    """Name of the baseline with the highest mean speed.

    Args:
        records: records of `run_speed`.
        names: names of the baselines.
    """
    return max(names, key=lambda name: _mean(_speeds(records, name)))


def compare_speeds(records: Sequence[Record], baseline: str, same_as: dict[str, str | None]) -> list[Speed]:
    """Figures of every system relative to the baseline.

    Args:
        records: records of `run_speed`.
        baseline: name of the baseline.
        same_as: name of each system -> the system whose output it must repeat, or None.
    """
    reference = _speeds(records, baseline)
    reference_prefill = _mean(times_of(records, baseline, "prefill"))
    result = []
    for name, other in same_as.items():
        runs = [record["runs"][name] for record in records]
        speed = _speeds(records, name)
        prefill = _mean(times_of(records, name, "prefill"))
        drafted = [count for run in runs for count in run["drafted"]]
        accepted = [count for run in runs for count in run["accepted"]]
        # A prefill is a step like others only where it verifies a draft.
        steps = [count for run in runs for count in run["accepted"][0 if run["drafted"] and run["drafted"][0] else 1 :]]
        drafts = any(drafted)
        result.append(
            Speed(
                **vars(quality([run["score"] for run in runs])),
                name=name,
                tokens=_mean([len(run["ids"]) for run in runs]),
                speed=_mean(speed),
                relative=relative_speed(speed, reference),
                interval=bootstrap_interval(relative_speed, speed, reference, groups=pictures(records)),
                prefill=prefill,
                decode=_mean(times_of(records, name, "total")) - prefill,
                draft=_mean(times_of(records, name, "draft")),
                verify=_mean(times_of(records, name, "verify")),
                relative_prefill=reference_prefill / prefill,
                acceptance=acceptance_rate(drafted, accepted),
                accepted_length=mean_accepted_length(steps) if drafts else float("nan"),
                different=None
                if other is None
                else sum(r["runs"][name]["ids"] != r["runs"][other]["ids"] for r in records),
                ran=_ran_again(runs),
                again=_share_again(
                    [None if run.get("looks") is None else len(run["looks"]) for run in runs],
                    [max(0, len(run["accepted"]) - 1) for run in runs],
                ),
            )
        )
    return result


@dataclass(frozen=True, kw_only=True)
class BatchSpeed(Quality):
    """Figures of one system at one batch size."""

    name: str
    """Name of the system."""
    size: int
    """Number of rows of a batch."""
    speed: float
    """New tokens per second of all rows together: all tokens divided by the sum of the batches' median times."""
    relative: float
    """Speed divided by that of the fastest baseline at the same size."""
    peak: float
    """Peak memory over all batches in bytes; nan where the machine does not report it."""
    is_baseline: bool
    """Whether it is the fastest baseline at this size."""


def compare_batches(records: Sequence[Record], baselines: Sequence[str]) -> list[BatchSpeed]:
    """Figures of every system at every size, in the order of the records.

    Args:
        records: records of `run_batches`.
        baselines: names of systems; the fastest one at each size is the baseline.
    """
    result = []
    for size in dict.fromkeys(record["size"] for record in records):
        runs = [record["runs"] for record in records if record["size"] == size]
        speed = {
            name: sum(sum(run[name]["tokens"]) for run in runs) / sum(median(run[name]["total"]) for run in runs)
            for name in runs[0]
        }
        baseline = max(baselines, key=speed.__getitem__)
        for name in runs[0]:
            peaks = [run[name]["peak"] for run in runs]
            highest = float("nan") if None in peaks else float(max(peaks))
            result.append(
                BatchSpeed(
                    **vars(quality([score for run in runs for score in run[name]["scores"]])),
                    name=name,
                    size=size,
                    speed=speed[name],
                    relative=speed[name] / speed[baseline],
                    peak=highest,
                    is_baseline=name == baseline,
                )
            )
    return result


def pictures(records: Sequence[Record]) -> list[object]:
    """An id of each record's picture. Raw results of older versions lack it; there each record counts as a picture of its own."""
    return [record["picture"] if "picture" in record else record["id"] for record in records]


def times_of(records: Sequence[Record], name: str, part: str) -> list[float]:
    """Seconds of a part of a system's answers to each prompt, median over repeats; nan if it has no such part.

    Args:
        records: records of `run_speed`.
        name: name of the system.
        part: prefill, total, draft or verify.
    """

    def middle(values: list[Any]) -> float:
        return median(values) if values[0] is not None else float("nan")

    return [middle(record["runs"][name][part]) for record in records]


def _speeds(records: Sequence[Record], name: str) -> list[float]:
    tokens = [len(record["runs"][name]["ids"]) for record in records]
    return list(speeds(tokens, times_of(records, name, "total")))


def _ran_again(runs: Sequence[dict[str, Any]]) -> float:
    """Visual tokens that ran again in an answer, mean over a system's runs of `run_speed`."""
    if any(run.get("looks") is None for run in runs):
        return float("nan")
    return _mean([sum(ran for _, ran in run["looks"]) for run in runs])


def _share_again(looks: Sequence[int | None], steps: Sequence[int]) -> float:
    """Share of all steps in which tokens were chosen again; nan without steps, or if it is unknown for an answer."""
    known = [count for count in looks if count is not None]
    if len(known) < len(looks) or not sum(steps):
        return float("nan")
    return sum(known) / sum(steps)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
