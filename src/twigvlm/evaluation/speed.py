"""Measure the speed of several ways to generate, which alternate on the same prompts in one run.

The baseline is the base's own `generate` with the faster of its attention implementations. All times are taken in the same way,
by a streamer that notes the first new token: prefill is everything up to it (vision included), decoding is the rest.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from transformers.generation.streamers import BaseStreamer

from twigvlm import compat
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.evaluation import peak_memory
from twigvlm.evaluation.accuracy import score
from twigvlm.evaluation.assisted import AssistedSteps, assisted_generation
from twigvlm.evaluation.questions import Namer, Questions
from twigvlm.evaluation.results_log import Record, ResultsLog
from twigvlm.evaluation.run import InputsOf, Item, one_by_one, run
from twigvlm.evaluation.systems import System, memory_remedy
from twigvlm.model import TwigVLM
from twigvlm.timing import clock_of

T = TypeVar("T")


def in_turn(systems: Sequence[System], turn: int) -> list[System]:
    """All systems in a random order that depends on the turn only.

    If the order were only rotated, each system would always follow the same one, whose effect on the machine's caches would be
    part of its times.

    Args:
        systems: the systems.
        turn: number of the turn, the seed of its order.
    """
    return random.Random(turn).sample(systems, len(systems))


def alternating(
    systems: Sequence[System], repeats: int, once: Callable[[dict[str, Any], System, int], T]
) -> Callable[[dict[str, Any], int, int], dict[str, list[T]]]:
    """A function that measures all systems several times on the same inputs, in an order that changes from turn to turn.

    Before any time counts, every system answers the first inputs once, to warm up.

    Args:
        systems: systems with different names.
        repeats: number of measurements of each system.
        once: (inputs, system, longest answer in tokens) -> one measurement.

    Returns:
        (inputs, longest answer in tokens, index of the inputs in the run) -> measurements by the systems' names.
    """
    warm = False

    def measurements(inputs: dict[str, Any], longest: int, number: int) -> dict[str, list[T]]:
        nonlocal warm
        for system in () if warm else systems:
            once(inputs, system, longest)
        warm = True
        taken: dict[str, list[T]] = {system.name: [] for system in systems}
        for turn in range(number * repeats, (number + 1) * repeats):
            for system in in_turn(systems, turn):
                taken[system.name].append(once(inputs, system, longest))
        return taken

    return measurements


@dataclass(frozen=True)
class Measurement:
    """One timed answer. Times are in seconds."""

    ids: list[int]
    """New token ids, the end token included."""
    prefill: float
    """From the call of `generate`, vision included, to the first new token."""
    total: float
    """From the call of `generate` to its return."""
    draft: float | None
    """Part of the decoding that drafts, as in `Timings`; None for the base's own `generate`."""
    verify: float | None
    """Part of the decoding that verifies, as in `Timings`; None for the base's own `generate`."""
    drafted: list[int]
    """Drafted tokens of each step, the prefill first; empty for the base's own `generate` without speculation."""
    accepted: list[int]
    """Accepted tokens of the same steps."""
    looks: list[tuple[int, int]] | None
    """(number of new tokens before, number of visual tokens that ran again) for each time refocusing chose visual tokens again;
    None: the system does not refocus."""


class FirstToken(BaseStreamer):
    """Notes when the first new token arrived, and passes everything on.

    Args:
        clock: function that gives the time in seconds.
        then: streamer to which everything is passed on; None: there is none.
    """

    def __init__(self, clock: Callable[[], float], then: BaseStreamer | None = None) -> None:
        self._clock, self._then, self._prompt_seen = clock, then, False
        self.at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt in the first call, and new tokens in each further one."""
        if self._prompt_seen and self.at is None:
            self.at = self._clock()
        self._prompt_seen = True
        if self._then is not None:
            self._then.put(value)

    def end(self) -> None:
        """End the answer."""
        if self._then is not None:
            self._then.end()


@contextmanager
def attention_of(model: Any, implementation: str | None) -> Iterator[None]:
    """Use another attention implementation in all parts of a Hugging Face model while the block runs.

    Args:
        model: a Hugging Face model.
        implementation: the attention implementation; None, or that of its language model: nothing is changed.

    Raises:
        TwigVLMError: the model does not have it, or a package that it needs is missing.
    """
    config = model.config
    if implementation in (None, compat.attention_implementation(config.get_text_config())):
        yield
        return
    parts = {"": config, **{name: getattr(config, name) for name in config.sub_configs}}
    # The vision tower's may be another one than the language model's.
    before = {name: compat.attention_implementation(part) for name, part in parts.items() if part is not None}
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


def check_attentions(model: Any, implementations: Iterable[str | None]) -> None:
    """Check, before anything is measured, that a Hugging Face model has these attention implementations.

    Args:
        model: a Hugging Face model.
        implementations: names of attention implementations; None among them counts as available.

    Raises:
        TwigVLMError: one of them is not available.
    """
    for implementation in implementations:
        with attention_of(model, implementation):
            pass


def measure(
    model: TwigVLM, inputs: dict[str, Any], system: System, max_new_tokens: int, assistant: Any = None
) -> Measurement:
    """Answer a prompt once, greedily, and measure the time.

    Args:
        model: the base with its twig.
        inputs: inputs of one prompt.
        system: how to answer.
        max_new_tokens: longest answer, in tokens.
        assistant: Hugging Face model that drafts, for systems that use one.

    Raises:
        TwigVLMError: the base has no such attention implementation, or transformers refuses to speculate on it.
    """
    clock = clock_of(model.model.device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    watch = FirstToken(clock)
    steps = AssistedSteps(watch)
    ours = system.attention is None
    generate: Callable[..., Any] = model.generate if ours else model.model.generate
    options |= system.arguments(model)
    with ExitStack() as around:
        around.enter_context(attention_of(model.model, system.attention))
        if system.speculates:
            drafter, name = assistant if system.assisted else None, f"system {system.name!r}"
            options |= around.enter_context(assisted_generation(model.base, inputs, drafter, steps, name))
        began = clock()
        output: Any = generate(**inputs, **options, streamer=steps if system.speculates else watch)
        ended = clock()
    drafted, accepted = ([], []) if not system.speculates else steps.counts()
    if ours:
        drafted, accepted = output.drafted_lengths[0], output.accepted_lengths[0]
    return Measurement(
        ids=output.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
        prefill=(ended if watch.at is None else watch.at) - began,
        total=ended - began,
        draft=output.timings.draft if ours else None,
        verify=output.timings.verify if ours else None,
        drafted=drafted,
        accepted=accepted,
        looks=None if not ours or output.looks is None else [(look.after, look.ran) for look in output.looks[0]],
    )


def peak_of(
    model: TwigVLM, inputs: dict[str, Any], system: System, max_new_tokens: int, assistant: Any = None
) -> int | None:
    """Peak memory in bytes while a system answers, weights included; None where the machine does not report it.

    Arguments and errors are those of `measure`.
    """
    peak_memory.reset_peak(model.model.device)
    measure(model, inputs, system, max_new_tokens, assistant)
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
    assistant: Any = None,
) -> list[Record]:
    """Time every system on every prompt `repeats` times, in an order that changes from turn to turn.

    Prompts that the log has already are not measured again. Before any time counts, every system answers the first prompt once.

    Args:
        model: the base with its twig.
        tokenizer: the base's tokenizer.
        questions: the questions.
        systems: systems with different names.
        inputs_of: prepares a question.
        results_log: log that gets the records.
        max_new_tokens: longest short answer, in tokens.
        max_description_tokens: longest description, in tokens.
        repeats: number of measurements of each system.
        advance: called with each record.
        memory: whether every system answers once more to measure its peak memory, without timing.
        assistant: Hugging Face model that drafts, for systems that use one.

    Returns:
        The records, in the order of the questions: the fields of `one_by_one` and, for each system, `runs`: `ids`, `text`,
        `score`, drafted and accepted lengths of each step, `looks` (as in `Measurement`), lists of seconds with one entry per
        repeat (`prefill`, `total`, `draft`, `verify`), and with `memory` the `peak` in bytes. Of several repeats, all but the
        seconds are those of the first. A question that failed has `failed`, the reason, instead of `runs`.

    Raises:
        TwigVLMError: the first question with inputs cannot be measured.
    """
    taken = alternating(systems, repeats, partial(measure, model, assistant=assistant))
    namer = Namer(questions.vocabulary)

    def times(item: Item, inputs: dict[str, Any], number: int) -> Record:
        longest = item.limit(max_new_tokens, max_description_tokens)
        measurements = taken(inputs, longest, number)
        runs = {name: _run(some, tokenizer) for name, some in measurements.items()}
        for one in runs.values():
            one["score"] = score(item.questions[0], one["text"], namer)
        for system in systems if memory else ():
            runs[system.name]["peak"] = peak_of(model, inputs, system, longest, assistant)
        return {"runs": runs}

    remedy = memory_remedy("pictures", systems)
    return run(one_by_one(questions.items), inputs_of, times, results_log, remedy, advance)


def _run(measurements: list[Measurement], tokenizer: Any) -> dict[str, Any]:
    one = measurements[0]
    return {
        "ids": one.ids,
        "text": tokenizer.decode(one.ids, skip_special_tokens=True).strip(),
        "drafted": one.drafted,
        "accepted": one.accepted,
        "looks": one.looks,
        **{name: [getattr(m, name) for m in measurements] for name in ("prefill", "total", "draft", "verify")},
    }
