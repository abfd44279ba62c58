"""Speed of several ways to generate, alternating on the same prompts in one run.

The baseline is the base's own `generate` with the better of its attention implementations. Every time is taken the same
way, by a streamer that notes the first new token: prefill is everything up to it (vision included), decoding the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from transformers.generation.streamers import BaseStreamer

from twigvlm import compat
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.evaluation import peak_memory
from twigvlm.evaluation.accuracy import score
from twigvlm.evaluation.questions import Namer, Questions
from twigvlm.evaluation.results_log import Record, ResultsLog
from twigvlm.evaluation.run import InputsOf, Item, one_by_one, run
from twigvlm.model import TwigVLM
from twigvlm.timing import clock_of

T = TypeVar("T")
HF_GENERATE = "HF generate, "
"""Begins the names of the base's own `generate`; its attention implementation follows."""


@dataclass(frozen=True)
class System:
    """One way to generate."""

    name: str
    attention: str | None = None
    """The base's own `generate` with this attention implementation; None: TwigVLM's, with `options`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `TwigVLM.generate`."""
    same_as: str | None = None
    """System whose output this one must repeat."""


def base_systems(attentions: Sequence[str]) -> list[System]:
    """The base's own `generate` with each of its attention implementations."""
    return [System(f"{HF_GENERATE}{attention}", attention) for attention in attentions]


def standard_systems(
    retain: float,
    chain: dict[str, Any],
    tree: dict[str, Any],
    attentions: Sequence[str],
    names: Sequence[str] = (),
    refocus: float | None = None,
) -> list[System]:
    """The base's `generate` per attention implementation, and the twig's parts alone and together.

    Args:
        retain: R̄.
        chain: options of chain speculation (`draft_length`, `draft_threshold`).
        tree: options of tree speculation (`tree_depth`, `tree_width`, `tree_expand`, `tree_nodes`).
        attentions: implementations that the base's `generate` is measured with.
        names: of those among the others that are wanted, together with what their output is compared to; none: all.
        refocus: τ of further systems that choose their visual tokens again; None: there are none.

    Raises:
        TwigVLMError: there is no system of a name.
    """
    chain = {"speculate": "chain", **chain}
    tree = {"speculate": "tree", **tree}
    twigs = [
        System("own loop"),
        System("pruning", options={"retain": retain}),
        System("chain", options=chain, same_as="own loop"),
        System("tree", options=tree, same_as="own loop"),
        System("auto", options={"speculate": "auto"}, same_as="own loop"),
        System("pruning + chain", options={"retain": retain, **chain}, same_as="pruning"),
        System("pruning + tree", options={"retain": retain, **tree}, same_as="pruning"),
        System("pruning + auto", options={"retain": retain, "speculate": "auto"}, same_as="pruning"),
    ]
    if refocus is not None:
        again = {"retain": retain, "refocus": refocus}
        twigs += [
            System("refocus", options=again),
            System("refocus + chain", options={**again, **chain}, same_as="refocus"),
            System("refocus + auto", options={**again, "speculate": "auto"}, same_as="refocus"),
        ]
    known = {system.name: system for system in twigs}
    for name in names:
        if name not in known:
            raise TwigVLMError(f"system {name!r}: must be one of {', '.join(known)}")
    wanted = {*names, *(known[name].same_as for name in names)} if names else known.keys()
    return [
        *base_systems(attentions),
        *(system for system in twigs if system.name in wanted),
    ]


def in_turn(systems: Sequence[System], turn: int) -> list[System]:
    """All of them; another one begins in each turn."""
    first = turn % len(systems)
    return [*systems[first:], *systems[:first]]


def alternating(
    systems: Sequence[System], repeats: int, once: Callable[[dict[str, Any], System, int], T]
) -> Callable[[dict[str, Any], int, int], dict[str, list[T]]]:
    """How to measure all systems on the same inputs several times; another one begins in each turn.

    The first inputs are answered once by everyone before any time counts.

    Args:
        systems: with different names.
        repeats: measurements of each.
        once: (inputs, system, longest answer) -> one measurement.

    Returns:
        (inputs, longest answer, which inputs of the run these are) -> measurements by the systems' names.
    """
    warm = False

    def measurements(inputs: dict[str, Any], most: int, place: int) -> dict[str, list[T]]:
        nonlocal warm
        for system in () if warm else systems:
            once(inputs, system, most)
        warm = True
        taken: dict[str, list[T]] = {system.name: [] for system in systems}
        for turn in range(place, place + repeats):
            for system in in_turn(systems, turn):
                taken[system.name].append(once(inputs, system, most))
        return taken

    return measurements


def draft_systems(retain: float, lengths: Sequence[int], thresholds: Sequence[float]) -> list[System]:
    """Pruning without drafts, and with chains of every length δ and threshold θ."""
    pruning = {"retain": retain}
    return [
        System("pruning", options=pruning),
        *(
            System(
                f"δ={length} θ={threshold:g}",
                options={**pruning, "speculate": "chain", "draft_length": length, "draft_threshold": threshold},
                same_as="pruning",
            )
            for length in lengths
            for threshold in thresholds
        ),
    ]


@dataclass(frozen=True)
class Measurement:
    """One timed answer; times in seconds."""

    ids: list[int]
    prefill: float
    total: float
    draft: float | None
    verify: float | None
    drafted: list[int]
    accepted: list[int]


class FirstToken(BaseStreamer):
    """Notes when the first new token came, and passes tokens on.

    Args:
        clock: seconds.
        then: streamer that gets what this one gets.
    """

    def __init__(self, clock: Callable[[], float], then: BaseStreamer | None = None) -> None:
        self._clock, self._then, self._prompt_seen = clock, then, False
        self.at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """The first call brings the prompt, each further one new tokens."""
        if self._prompt_seen and self.at is None:
            self.at = self._clock()
        self._prompt_seen = True
        if self._then is not None:
            self._then.put(value)

    def end(self) -> None:
        """The answer is complete."""
        if self._then is not None:
            self._then.end()


@contextmanager
def attention_of(model: Any, implementation: str | None) -> Iterator[None]:
    """Inside, a Hugging Face model attends by another implementation; None: by its own."""
    before = compat.attention_implementation(model.config.get_text_config())
    if implementation in (None, before):
        yield
        return
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise TwigVLMError(
            f"attention {implementation!r}: not available here ({one_line(error)}); choose another"
        ) from None
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def measure(model: TwigVLM, inputs: dict[str, Any], system: System, max_new_tokens: int) -> Measurement:
    """Answer once, greedily, and time it."""
    clock = clock_of(model.model.device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    watch = FirstToken(clock)
    generate: Callable[..., Any] = model.generate if system.attention is None else model.model.generate
    with attention_of(model.model, system.attention):
        began = clock()
        output: Any = generate(**inputs, **options, **system.options, streamer=watch)
        ended = clock()
    own = system.attention is None
    return Measurement(
        ids=output.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        prefill=(ended if watch.at is None else watch.at) - began,
        total=ended - began,
        draft=output.timings.draft if own else None,
        verify=output.timings.verify if own else None,
        drafted=output.drafted_lengths[0] if own else [],
        accepted=output.accepted_lengths[0] if own else [],
    )


def peak_of(model: TwigVLM, inputs: dict[str, Any], system: System, max_new_tokens: int) -> int | None:
    """Most bytes held at once while a system answers, weights included; None where the machine does not say."""
    peak_memory.reset_peak(model.model.device)
    measure(model, inputs, system, max_new_tokens)
    return peak_memory.peak(model.model.device)


def run_speed(
    model: TwigVLM,
    tokenizer: Any,
    questions: Questions,
    systems: Sequence[System],
    inputs_of: InputsOf,
    results_log: ResultsLog,
    max_new_tokens: int,
    max_description_tokens: int,
    repeats: int,
    advance: Callable[[Record], None] = lambda record: None,
    memory: bool = False,
) -> list[Record]:
    """Time every system on every prompt, `repeats` times; who begins changes from turn to turn.

    Prompts that the results_log holds already are not measured again. The first prompt is answered once by everyone before
    any time counts.

    Args:
        memory: whether every system answers once more, while its peak memory is watched and no time counts.

    Returns:
        The records, in the order of the questions: `id`, `kind`, and by system `runs`: `ids`, `text`, `score`, drafted and
        accepted lengths of each step, lists of seconds (`prefill`, `total`, `draft`, `verify`), one per repeat, and with
        `memory` the `peak` in bytes. Of a question that failed: `id`, `kind` and `failed`, the reason.
    """
    taken = alternating(systems, repeats, partial(measure, model))
    namer = Namer(questions.vocabulary)

    def times(item: Item, inputs: dict[str, Any], place: int) -> Record:
        most = item.limit(max_new_tokens, max_description_tokens)
        measurements = taken(inputs, most, place)
        runs = {name: _run(some, tokenizer) for name, some in measurements.items()}
        for one in runs.values():
            one["score"] = score(item.questions[0], one["text"], namer)
        for system in systems if memory else ():
            runs[system.name]["peak"] = peak_of(model, inputs, system, most)
        return {"runs": runs}

    return run(one_by_one(questions.items), inputs_of, times, results_log, advance)


def _run(measurements: list[Measurement], tokenizer: Any) -> dict[str, Any]:
    one = measurements[0]
    return {
        "ids": one.ids,
        "text": tokenizer.decode(one.ids, skip_special_tokens=True).strip(),
        "drafted": one.drafted,
        "accepted": one.accepted,
        **{name: [getattr(m, name) for m in measurements] for name in ("prefill", "total", "draft", "verify")},
    }
