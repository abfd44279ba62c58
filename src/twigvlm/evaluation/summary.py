"""From raw records to figures. Pure functions; tables are made of these by `report`."""

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
    """What answers are worth; shares from 0 to 1, nan where no answer is of the kind."""

    exact: float
    """Exact match, of answers that are right or wrong."""
    recall: float
    """Objects in pictures that descriptions name."""
    precision: float
    """Objects that descriptions name and that are there."""
    read: float
    """Texts in pictures that descriptions quote right."""


def quality(scores: Sequence[int | list[int]]) -> Quality:
    """Of answers by their scores, as `accuracy.score` gives them."""
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
    """One variant on all questions."""

    name: str
    kept: float
    """R, mean over questions."""
    average: float
    """R̄, mean over questions."""
    ran: float
    """Visual tokens of an answer that were chosen again and ran through the pruned layers, mean over questions."""
    again: float
    """Share of the steps of decoding in which tokens were chosen again, of all answers together; nan where the method does not
    refocus, and where older raw results do not say."""
    relative: float
    """RelAcc."""
    interval: Interval
    """Of RelAcc, 95 %, paired, over pictures."""
    kinds: dict[str, tuple[int, float]]
    """Number of questions and exact match per kind."""


def accuracies(records: Sequence[Record]) -> list[Accuracy]:
    """Every variant's figures, in the order of the first record; RelAcc is against the variant without pruning.

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
    """One system on all prompts; times in seconds, means over prompts of the median over repeats."""

    name: str
    tokens: float
    """New tokens of an answer."""
    speed: float
    """Tokens per second, prefill and decoding together; mean over prompts."""
    relative: float
    """RelSpd."""
    interval: Interval
    """Of RelSpd, 95 %, paired, over pictures."""
    prefill: float
    decode: float
    draft: float
    verify: float
    relative_prefill: float
    """Prefill time of the baseline over this one's: above 1 is faster."""
    acceptance: float
    """TokAR."""
    accepted_length: float
    """Accepted tokens per step."""
    different: int | None
    """Prompts whose output differs from that of the system that it must repeat; None if there is none."""
    ran: float
    """Visual tokens of an answer that were chosen again and ran through the pruned layers, mean over prompts; nan where the
    system does not refocus, and where older raw results do not say."""
    again: float
    """Share of the steps of decoding in which tokens were chosen again, of all answers together; nan in the same cases."""


def faster(records: Sequence[Record], names: Sequence[str]) -> str:
    """Of several baselines the one with the higher mean speed."""
    return max(names, key=lambda name: _mean(_speeds(records, name)))


def compare_speeds(records: Sequence[Record], baseline: str, same_as: dict[str, str | None]) -> list[Speed]:
    """Every system's figures against the baseline.

    Args:
        records: records of `run_speed`.
        baseline: a system.
        same_as: systems, and whose output each must repeat.
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
    """One system at one batch size."""

    name: str
    size: int
    speed: float
    """New tokens per second of all rows together: all tokens over the sum of the batches' median times."""
    relative: float
    """Speed over that of the fastest baseline at the same size."""
    peak: float
    """Most bytes held at once by any batch; nan where the system does not say."""
    is_baseline: bool


def compare_batches(records: Sequence[Record], baselines: Sequence[str]) -> list[BatchSpeed]:
    """Every system at every size, in the order of the records.

    Args:
        records: records of `run_batches`.
        baselines: systems, of which at each size the faster one is the baseline.
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
    """Which picture each record is about; raw results of older versions do not say: each has its own."""
    return [record["picture"] if "picture" in record else record["id"] for record in records]


def times_of(records: Sequence[Record], name: str, part: str) -> list[float]:
    """Seconds of a part of a system's answers, per prompt the median over repeats; nan where it has no such part.

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
    """Visual tokens that an answer chose again, mean over a system's runs of `run_speed`."""
    if any(run.get("looks") is None for run in runs):
        return float("nan")
    return _mean([sum(ran for _, ran in run["looks"]) for run in runs])


def _share_again(looks: Sequence[int | None], steps: Sequence[int]) -> float:
    """Share of all steps in which tokens were chosen again; nan without steps, or where an answer does not say how often."""
    known = [count for count in looks if count is not None]
    if len(known) < len(looks) or not sum(steps):
        return float("nan")
    return sum(known) / sum(steps)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def exactness_counts(records: Sequence[Record]) -> dict[str, tuple[int, list[str]]]:
    """Per check, how many prompts passed, and the ids of those that did not."""
    return {
        check: (
            sum(record["same"][check] for record in records),
            [record["id"] for record in records if not record["same"][check]],
        )
        for check in records[0]["same"]
    }
