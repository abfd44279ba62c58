"""Compare all methods with each other: the combinations that take part, and the figures of each."""

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
"""Kinds of answers that are reported separately -> the value of `Question.has_long_answer`."""


@dataclass(frozen=True)
class Combination:
    """A way to prune under one budget, and a way to draft."""

    variant: Variant
    """How to prune, and the budget."""
    speculate: str = "none"
    """How to draft, as in `TwigVLM.generate`."""
    hf: bool = False
    """Whether the base's own `generate` is timed instead of TwigVLM's."""

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
"""The base's own `generate`, and TwigVLM's without pruning or drafts, which shows what the other loop alone gains."""


def make_combinations(variants: Sequence[Variant], ways: Sequence[str], timed: bool = True) -> list[Combination]:
    """The base, every variant with every way to draft and, if answers are timed, `LOOP`.

    Args:
        variants: from `make_variants`.
        ways: ways to draft, as in `TwigVLM.generate`.
        timed: whether answers are timed.
    """
    every = [Combination(variant, way) for variant in variants for way in ways]
    return list(dict.fromkeys([BASE, LOOP, *every] if timed else [BASE, *(one for one in every if one != LOOP)]))


def combination_systems(
    model: TwigVLM, combinations: Sequence[Combination], attentions: Sequence[str], seed: int = 0
) -> list[System]:
    """The systems that time the combinations, each by itself, from the picture to the last token.

    Args:
        model: the model that answers.
        combinations: result of `make_combinations`.
        attentions: attention implementations with which the base's `generate` is timed.
        seed: seed of random choices.
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
    """The first `count` questions of each length of answers."""
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
    """A function that prepares questions, and fails for prompts that cannot have the budget of every variant.

    Args:
        model: the model that answers.
        variants: from `make_variants`.
        questions: all questions.
        inputs_of: prepares questions.

    Raises:
        TwigVLMError: the first question with inputs cannot have a budget; the message names every such method.
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
    """Times of a combination's answers of one length, relative to the base's. Ratios are medians over questions."""

    count: int
    """Number of timed answers."""
    speed: Speed
    """Figures of the combination itself, means over questions."""
    relative: float
    """Tokens per second, prefill and decoding together, over the base's: above 1 is faster."""
    interval: Interval
    """95 % interval of `relative`, by a paired bootstrap over pictures."""
    prefill: float
    """The base's prefill time, vision included, over that of the combination: above 1 is faster."""
    decode: float
    """The same of the decoding time per token after the first."""
    share: float
    """Time for an answer over the base's: below 1 is faster."""
    different: int | None
    """Number of timed answers that differ from those whose quality was measured; None: it draws at random each time."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One combination in the table. Lengths of answers without a question are missing."""

    combination: Combination
    """What was compared."""
    average: float
    """R̄, mean over questions."""
    quality: dict[str, Accuracy]
    """Accuracy by length of answers."""
    times: dict[str, Times]
    """Times by length of answers."""
    peak: float
    """Peak memory of the timed answers in bytes, weights included; nan where the machine does not report it."""


def compare(
    answers: Sequence[Record],
    timed: Sequence[Record],
    combinations: Sequence[Combination],
    attentions: Sequence[str],
) -> list[Line]:
    """Compute the line of each combination.

    Args:
        answers: records of `run_accuracy`, without those that failed.
        timed: records of `run_speed` on `combination_systems`, without those that failed; may be empty.
        combinations: from `make_combinations`.
        attentions: attention implementations with which the base's `generate` was timed; the faster one counts, at each length.
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
    """Seconds of a system, per question."""

    def __init__(self, records: Sequence[Record], name: str) -> None:
        tokens = [len(record["runs"][name]["ids"]) for record in records]
        self.prefill, self.total = times_of(records, name, "prefill"), times_of(records, name, "total")
        self.speed: Column = speeds(tokens, self.total)
        parts = zip(tokens, self.prefill, self.total, strict=True)
        self.per_token = [(total - first) / (n - 1) if n > 1 else float("nan") for n, first, total in parts]


def _peak(records: Sequence[Record], names: Sequence[str]) -> float:
    """The smallest peak memory of several systems, since the base's attention implementations stand for one another."""
    peaks = [[record["runs"][name]["peak"] for record in records] for name in names]
    if not records or any(held is None for some in peaks for held in some):
        return float("nan")
    return float(min(max(some) for some in peaks))
