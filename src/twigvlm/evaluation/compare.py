"""All methods in one comparison: who takes part, and one line per method, budget and way to draft."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import mean
from typing import Any

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.methods import parse_method
from twigvlm.evaluation.metrics import Column, bootstrap_interval, median_ratio, speeds
from twigvlm.evaluation.questions import Question
from twigvlm.evaluation.results_log import Record
from twigvlm.evaluation.run import InputsOf
from twigvlm.evaluation.summary import Accuracy, Interval, Speed, accuracies, compare_speeds, faster, pictures, times_of
from twigvlm.evaluation.systems import OWN_LOOP, System, base_systems
from twigvlm.evaluation.variants import NONE, Variant, check_variants, generate_options
from twigvlm.model import TwigVLM

LENGTHS = {"short": False, "long": True}
"""Kinds of answers that are told apart, by `Question.has_long_answer`."""


@dataclass(frozen=True)
class Combination:
    """A way to prune under one budget, and a way to draft."""

    variant: Variant
    speculate: str = "none"
    hf: bool = False
    """Whether the base's own `generate` is timed, instead of TwigVLM's."""

    @property
    def name(self) -> str:
        """For example `visionzip@64 + chain`."""
        return OWN_LOOP if self == LOOP else self.variant.name + self._drafts

    @property
    def label(self) -> str:
        """The name without the budget; `base` where nothing is pruned."""
        if self == LOOP:
            return OWN_LOOP
        return ("base" if self.variant == NONE else self.variant.method) + self._drafts

    @property
    def _drafts(self) -> str:
        return "" if self.speculate == "none" else f" + {self.speculate}"


BASE, LOOP = Combination(NONE, hf=True), Combination(NONE)
"""The base's own `generate`, and TwigVLM's that neither prunes nor drafts: what every method gains beside its pruning."""


def make_combinations(variants: Sequence[Variant], ways: Sequence[str], timed: bool = True) -> list[Combination]:
    """The base, and every variant with every way to draft; if answers are timed, also `LOOP`."""
    every = [Combination(variant, way) for variant in variants for way in ways]
    return list(dict.fromkeys([BASE, LOOP, *every] if timed else [BASE, *(one for one in every if one != LOOP)]))


def combination_systems(
    model: TwigVLM, combinations: Sequence[Combination], attentions: Sequence[str], seed: int = 0
) -> list[System]:
    """How combinations answer while they are timed: each on its own, from the picture to the last token.

    Args:
        model: that answers.
        combinations: from `make_combinations`.
        attentions: implementations that the base's `generate` is timed with.
        seed: seed of the random choice.
    """
    return [
        *base_systems(attentions),
        *(
            System(one.name, options={**generate_options(model, one.variant, seed), "speculate": one.speculate})
            for one in combinations
            if one != BASE
        ),
    ]


def timed_questions(questions: Sequence[Question], count: int) -> tuple[Question, ...]:
    """The first questions of each length."""
    seen = dict.fromkeys(LENGTHS.values(), 0)
    chosen = []
    for question in questions:
        seen[question.has_long_answer] += 1
        if seen[question.has_long_answer] <= count:
            chosen.append(question)
    return tuple(chosen)


def checked_inputs(
    model: TwigVLM, variants: Sequence[Variant], questions: Sequence[Question], inputs_of: InputsOf
) -> Callable[..., dict[str, Any]]:
    """Inputs of questions whose prompts can have every variant's budget; others fail.

    Raises:
        TwigVLMError: the first question that has inputs cannot have a budget; names every such method.
    """

    def check(inputs: dict[str, Any]) -> dict[str, Any]:
        check_variants(model, variants, int(model.base.visual_mask(inputs["input_ids"]).sum()))
        return inputs

    for question in questions:
        inputs = None
        with suppress(TwigVLMError):
            inputs = inputs_of(question)
        if inputs is not None:
            check(inputs)
            break
    return lambda *some: check(inputs_of(*some))


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of a combination's answers of one length, against the base's: ratios are medians over questions, above 1 is faster."""

    count: int
    """Answers."""
    speed: Speed
    """Its own figures, means over questions."""
    relative: float
    """Of tokens per second, prefill and decoding together."""
    interval: Interval
    """Of `relative`, 95 %, paired, over pictures."""
    prefill: float
    """Of prefill times, the vision tower included."""
    decode: float
    """Of decoding times per token after the first."""
    share: float
    """Its time for an answer over the base's: below 1 is faster."""
    different: int | None
    """Timed answers that differ from those whose quality was measured; None: it draws at random, differently each time."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One combination in the table; lengths of which there is no question are missing."""

    combination: Combination
    average: float
    """R̄, mean over questions."""
    quality: dict[str, Accuracy]
    """By length."""
    times: dict[str, Times]
    """By length."""
    peak: float
    """Most bytes held at once by any timed answer, weights included; nan where the machine does not say."""


def compare(
    answers: Sequence[Record],
    timed: Sequence[Record],
    combinations: Sequence[Combination],
    attentions: Sequence[str],
) -> list[Line]:
    """A line per combination.

    Args:
        answers: records of `run_accuracy`, without those that failed.
        timed: records of `run_speed` on `combination_systems`, without those that failed; may be empty.
        combinations: from `make_combinations`.
        attentions: implementations that the base's `generate` was timed with; the faster one counts, at each length.
    """
    baselines = [system.name for system in base_systems(attentions)]
    given = {record["id"]: record["given"] for record in answers}
    quality, times = {}, {}
    for length, is_long in LENGTHS.items():
        of_length = [record for record in answers if record["long"] == is_long]
        if of_length:
            quality[length] = {one.name: one for one in accuracies(of_length)}
        timed_here = [record for record in timed if record["long"] == is_long]
        if timed_here:
            times[length] = _times(timed_here, given, combinations, baselines)
    return [
        Line(
            combination=one,
            average=mean(record["average"][one.variant.name] for record in answers),
            quality={length: figures[one.variant.name] for length, figures in quality.items()},
            times={length: figures[one] for length, figures in times.items()},
            peak=_peak(timed, baselines if one == BASE else [one.name]),
        )
        for one in combinations
    ]


def _times(
    records: Sequence[Record],
    given: Mapping[str, Mapping[str, str]],
    combinations: Sequence[Combination],
    baselines: Sequence[str],
) -> dict[Combination, Times]:
    baseline = faster(records, baselines)
    names = {one: baseline if one == BASE else one.name for one in combinations}
    figures = {one.name: one for one in compare_speeds(records, baseline, dict.fromkeys(names.values()))}
    base = _Seconds(records, baseline)
    found = {}
    for one, name in names.items():
        mine = _Seconds(records, name)
        texts = [(record["runs"][name]["text"], given.get(record["id"], {})) for record in records]
        by_chance = parse_method(one.variant.method).is_random
        found[one] = Times(
            count=len(records),
            speed=figures[name],
            relative=median_ratio(mine.speed, base.speed),
            interval=bootstrap_interval(median_ratio, mine.speed, base.speed, groups=pictures(records)),
            prefill=median_ratio(base.prefill, mine.prefill),
            decode=median_ratio(base.per_token, mine.per_token),
            share=median_ratio(mine.total, base.total),
            different=None if by_chance else sum(text != untimed.get(one.variant.name) for text, untimed in texts),
        )
    return found


class _Seconds:
    """What a system took, per question."""

    def __init__(self, records: Sequence[Record], name: str) -> None:
        tokens = [len(record["runs"][name]["ids"]) for record in records]
        self.prefill, self.total = times_of(records, name, "prefill"), times_of(records, name, "total")
        self.speed: Column = speeds(tokens, self.total)
        parts = zip(tokens, self.prefill, self.total, strict=True)
        self.per_token = [(total - first) / (n - 1) if n > 1 else float("nan") for n, first, total in parts]


def _peak(records: Sequence[Record], names: Sequence[str]) -> float:
    """Of several names the least: the base's implementations stand for one another."""
    peaks = [[record["runs"][name]["peak"] for record in records] for name in names]
    if not records or any(held is None for some in peaks for held in some):
        return float("nan")
    return float(min(max(some) for some in peaks))
