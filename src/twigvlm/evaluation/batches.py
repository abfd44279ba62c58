"""Speed and peak memory of batches of several sizes, alternating in one run, on the same prompts for every size."""

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
from twigvlm.evaluation.systems import System, base_systems
from twigvlm.model import TwigVLM
from twigvlm.timing import clock_of


def batch_systems(method: str, retain: float, attentions: Sequence[str]) -> list[System]:
    """The base's `generate` per attention implementation, and pruning without drafts and with the twig's.

    Args:
        method: what prunes, as `parse_method` reads it.
        retain: R̄.
        attentions: implementations that the base's `generate` is measured with.
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
    """Batches of equal size.

    Raises:
        TwigVLMError: they do not come out even.
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
    """Answer all prompts in batches of every size by every system; their order changes from turn to turn.

    Batches that the log holds already are not measured again. The first batch of a run is answered once by everyone
    before any time counts.

    Returns:
        The records: `id`, `size`, and by system `runs`: new `tokens` of each row, up to its end token, `scores` of its answer,
        and lists of `total` seconds and `peak` bytes, one per repeat. Of a batch with a question that failed: `id`, `size` and
        `failed`.

    Raises:
        TwigVLMError: a size that does not divide the number of prompts.
    """
    taken = alternating(systems, repeats, partial(_measure, model))
    namer = Namer(questions.vocabulary)

    def times(item: Item, inputs: dict[str, Any], number: int) -> Record:
        longest = item.limit(max_new_tokens, max_description_tokens)
        runs = {}
        for name, some in taken(inputs, longest, number).items():
            answers, seconds, peaks = zip(*some, strict=True)
            pairs = zip(item.questions, answers[-1], strict=True)
            texts = [(question, tokenizer.decode(ids, skip_special_tokens=True)) for question, ids in pairs]
            runs[name] = {
                "tokens": [len(ids) for ids in answers[-1]],
                "scores": [score(question, text.strip(), namer) for question, text in texts],
                "total": seconds,
                "peak": peaks,
            }
        return {"runs": runs}

    items = [
        Item({"id": f"{size}-{number}", "size": size}, batch)
        for size in sizes
        for number, batch in enumerate(split(questions.items, size))
    ]
    return run(items, inputs_of, times, results_log, advance)


def _measure(
    model: TwigVLM, inputs: dict[str, Any], system: System, max_new_tokens: int
) -> tuple[list[list[int]], float, int | None]:
    """New ids of each row, seconds, and peak bytes of one greedy answer to a batch."""
    device = model.model.device
    clock = clock_of(device)
    generate: Callable[..., Any] = model.generate if system.attention is None else model.model.generate
    options = system.arguments(model)
    with attention_of(model.model, system.attention):
        peak_memory.reset_peak(device)
        began = clock()
        ids = generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False)
        ended = clock()
    new = ids[:, inputs["input_ids"].shape[1] :]
    return up_to_end(new.tolist(), model.model.generation_config), ended - began, peak_memory.peak(device)


def up_to_end(rows: Iterable[list[int]], generation: Any) -> list[list[int]]:
    """New ids of each row up to its first end token, that included; after it a batch is padded.

    Args:
        rows: new ids.
        generation: the base's generation config, which names the end tokens.
    """
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row)) + 1] for row in rows]
