"""Measure speed and peak memory of batches of several sizes on the same prompts; systems alternate in one run."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation import peak_memory
from twigvlm.evaluation.accuracy import score
from twigvlm.evaluation.questions import Namer, Question, Questions
from twigvlm.evaluation.results_log import Record, ResultsLog
from twigvlm.evaluation.run import InputsOf, Item, run
from twigvlm.evaluation.speed import alternating, attention_of
from twigvlm.evaluation.systems import System, base_systems, memory_remedy
from twigvlm.model import TwigVLM
from twigvlm.timing import clock_of


def batch_systems(method: str, retain: float, attentions: Sequence[str]) -> list[System]:
    """The systems to compare: the base's `generate` with each attention implementation, and pruning with and without drafts.

    Args:
        method: name of the pruning method, for `parse_method`.
        retain: R̄.
        attentions: attention implementations with which the base's `generate` is measured.
    """
    return [
        *base_systems(attentions),
        System(method, options={"retain": retain}, method=method),
        *(
            System(f"{method} + {way}", options={"retain": retain, "speculate": way}, method=method)
            for way in ("chain", "auto")
        ),
    ]


def split(questions: Sequence[Question], size: int) -> list[Sequence[Question]]:
    """Split questions into batches of equal size.

    Raises:
        TwigVLMError: the number of questions is not a multiple of the size.
    """
    if size < 1 or len(questions) % size:
        raise TwigVLMError(
            f"sizes: {size} does not divide {len(questions)}, the number of prompts; choose --limit and --sizes that fit"
        )
    return [questions[start : start + size] for start in range(0, len(questions), size)]


def run_batches(
    model: TwigVLM,
    tokenizer: Any,
    questions: Questions,
    sizes: Sequence[int],
    systems: Sequence[System],
    inputs_of: InputsOf,
    results_log: ResultsLog,
    max_new_tokens: int,
    max_description_tokens: int,
    repeats: int,
    advance: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Answer all prompts in batches of every size by every system, in an order that changes from turn to turn.

    Batches that the log has already are not measured again. Every system answers each batch once to measure its memory, and the
    first batch of each size once more to warm up, before times count.

    Args:
        sizes: numbers of rows of a batch, each of which divides the number of questions.
        systems: from `batch_systems`.
        inputs_of: prepares several questions as a batch.
        repeats: number of measurements of each system on each batch.

    The other arguments are those of `run_speed`.

    Returns:
        The records: `id`, `size` and, for each system, `runs`: new `tokens` of each row, end token included, `scores` of its
        answer, `total` seconds, a list with one entry per repeat, and `peak` bytes (None where the machine does not report it).
        A batch with a question that failed has `id`, `size` and `failed`, the reason.

    Raises:
        TwigVLMError: a size does not divide the number of prompts.
    """
    taken = {size: alternating(systems, repeats, partial(_measure, model)) for size in sizes}
    namer = Namer(questions.vocabulary)

    def times(item: Item, inputs: dict[str, Any], number: int) -> Record:
        longest = item.limit(max_new_tokens, max_description_tokens)
        peaks = {system.name: _peak(model, inputs, system, longest) for system in systems}
        runs = {}
        for name, some in taken[len(item.questions)](inputs, longest, number).items():
            answers, seconds = zip(*some, strict=True)
            pairs = zip(item.questions, answers[-1], strict=True)
            texts = [(question, tokenizer.decode(ids, skip_special_tokens=True)) for question, ids in pairs]
            runs[name] = {
                "tokens": [len(ids) for ids in answers[-1]],
                "scores": [score(question, text.strip(), namer) for question, text in texts],
                "total": seconds,
                "peak": peaks[name],
            }
        return {"runs": runs}

    items = [
        Item({"id": f"{size}-{number}", "size": size}, batch)
        for size in sizes
        for number, batch in enumerate(split(questions.items, size))
    ]
    return run(items, inputs_of, times, results_log, memory_remedy("pictures or --sizes", systems), advance)


def _measure(
    model: TwigVLM, inputs: dict[str, Any], system: System, max_new_tokens: int
) -> tuple[list[list[int]], float]:
    """Answer a batch greedily once: new ids of each row, and seconds."""
    clock = clock_of(model.model.device)
    generate: Callable[..., Any] = model.generate if system.attention is None else model.model.generate
    options = system.arguments(model)
    with attention_of(model.model, system.attention):
        began = clock()
        ids = generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False)
        ended = clock()
    new = ids[:, inputs["input_ids"].shape[1] :]
    return up_to_end(new.tolist(), model.model.generation_config), ended - began


def _peak(model: TwigVLM, inputs: dict[str, Any], system: System, max_new_tokens: int) -> int | None:
    """Peak memory in bytes while a batch is answered. Not measured while timing, since it first frees cached memory."""
    peak_memory.reset_peak(model.model.device)
    _measure(model, inputs, system, max_new_tokens)
    return peak_memory.peak(model.model.device)


def up_to_end(rows: Iterable[list[int]], generation: Any) -> list[list[int]]:
    """New ids of each row up to and including its first end token, after which a batch is padded.

    Args:
        rows: new ids.
        generation: the base's generation config, which names the end tokens.
    """
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row)) + 1] for row in rows]
