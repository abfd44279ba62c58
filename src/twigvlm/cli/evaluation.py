"""What the evaluations share: load, ask with progress, and write raw results and the report."""

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
import transformers

from twigvlm.base.vlm import BaseVLM
from twigvlm.checkpoints.hub import fetch
from twigvlm.checkpoints.twig_files import FILES, WEIGHTS, fingerprint
from twigvlm.cli.evaluate import Accuracy, Batches, Common, Drafts, Exactness, Speed, Sweep
from twigvlm.cli.output import busy, check_directory, progress
from twigvlm.cli.session import build_inputs, load_base
from twigvlm.config import SpeculationConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.accuracy import InputsOf, run_accuracy
from twigvlm.evaluation.batches import batch_systems, run_batches, split
from twigvlm.evaluation.exactness import choose_checks, run_exactness
from twigvlm.evaluation.figures import draw_accuracy, figure_class
from twigvlm.evaluation.progress import Progress
from twigvlm.evaluation.questions import Question, Questions, load_questions
from twigvlm.evaluation.report import (
    accuracy_sections,
    batch_sections,
    exactness_sections,
    failed_sections,
    page,
    speed_sections,
)
from twigvlm.evaluation.results_log import Record, ResultsLog, answered
from twigvlm.evaluation.speed import System, draft_systems, run_speed, standard_systems
from twigvlm.evaluation.summary import accuracies
from twigvlm.evaluation.variants import make_variants
from twigvlm.files import replacing
from twigvlm.loading import SAPLING
from twigvlm.model import TwigVLM

RAW, REPORT, FIGURE = "results.jsonl", "report.md", "figure.png"
_EVERY = 25  # records between two lines of progress where stderr is no terminal


@dataclasses.dataclass(frozen=True)
class Bench:
    """A loaded base, the twig's directory, and the questions."""

    base: Any
    body: BaseVLM
    """The base, opened at its layers."""
    processor: Any
    twig: str
    questions: Questions
    settings: dict[str, Any]
    """What every result depends on."""

    def grow(self) -> TwigVLM:
        """The base with its twig."""
        return TwigVLM.from_pretrained(self.base, self.twig)

    def inputs_of(self, *questions: Question) -> dict[str, Any]:
        """A question, or several as a batch, as the base's inputs.

        Raises:
            TwigVLMError: a picture cannot be read, the processor or its template refuses, or the context is too short.
        """
        images = [question.image for question in questions]
        inputs = build_inputs(self.base, self.processor, images, [question.prompt for question in questions])
        self.body.check_context(inputs["input_ids"])
        return inputs


def open_bench(options: Common, validation: str = "") -> Bench:
    """Load what the options name; `validation`: what is chosen by it, so that the test split is refused."""
    check_directory(options.output, "output")
    for name in ("max_new_tokens", "max_description_tokens"):
        if getattr(options, name) < 1:
            raise TwigVLMError(f"{name}={getattr(options, name)}: must be 1 or more")
    everything = load_questions(options.questions)
    if validation:
        everything.refuse_test(validation)
    questions = everything.chosen(options.kinds, options.limit)
    twig = options.twig
    if twig is None:
        if options.model != SAPLING:
            raise TwigVLMError(f"model {options.model!r}: needs a twig grown on it; give --twig DIR")
        from twigvlm import sapling

        twig = str(sapling.twig_path())
    weights = fetch(twig, FILES, None, None) / WEIGHTS
    if not weights.is_file():
        raise TwigVLMError(f"twig {twig!r}: no twig here ({WEIGHTS} is missing); give a directory made by training")
    with busy(f"Loading {options.model}"):
        base, processor = load_base(options.model, options.dtype, options.device)
    if options.attention != "auto":
        base.set_attn_implementation(options.attention)  # before a twig grows: it takes its base's
    body = BaseVLM(base)
    settings = {
        "model": _digest(json.dumps(fingerprint(body), sort_keys=True).encode()),
        "twig": _digest(weights.read_bytes()),
        "questions": _digest(options.questions.read_bytes()),
        "dtype": str(base.dtype).removeprefix("torch."),
        "attention": body.attention,
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
        "max new tokens": options.max_new_tokens,
        "max description tokens": options.max_description_tokens,
    }
    return Bench(base, body, processor, twig, questions, settings)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _machine() -> dict[str, Any]:
    """What times depend on beside the settings of a run."""
    return {"threads": torch.get_num_threads(), "CPU": torch.backends.cpu.get_cpu_capability(), **_versions()}


def _versions() -> dict[str, Any]:
    return {"torch": torch.__version__, "transformers": transformers.__version__, "twigvlm": version("twigvlm")}


def run_pruning(
    options: Accuracy | Sweep,
    title: str,
    methods: Sequence[str],
    final_wipes: Sequence[int],
    seed: int,
    figure: bool,
    bench: Bench | None = None,
) -> None:
    """Ask every question under every variant."""
    if figure:
        figure_class()  # for its error, before hours of work
    bench = bench or open_bench(options)
    model = bench.grow()
    variants = make_variants(model, methods, options.budgets, final_wipes)
    names = [variant.name for variant in variants]
    results_log = ResultsLog(options.output / RAW, {**bench.settings, "variants": names, "seed": seed})
    running = Progress()
    with _advancing(title, len(bench.questions.items), running) as advance:
        records = run_accuracy(
            model,
            bench.processor.tokenizer,
            bench.questions,
            variants,
            bench.inputs_of,
            results_log,
            options.max_new_tokens,
            options.max_description_tokens,
            seed,
            advance,
        )
    figures = accuracies(answered(records), {question.id: question.image for question in bench.questions.items})
    _write(options, title, bench, {"seed": seed}, accuracy_sections(figures, variants), records)
    if figure:
        draw_accuracy(figures, variants, options.output / FIGURE)
        print(f"Figure: {options.output / FIGURE}")


def run_sweep(options: Sweep) -> None:
    """Ask every question under every K_f."""
    bench = open_bench(options, validation="choosing K_f")
    layers = BaseVLM(bench.base).num_layers
    wipes = options.final_wipes or tuple(range(layers, layers // 2, -4))
    run_pruning(options, "Sweep of K_f", (options.method,), wipes, options.seed, options.figure, bench)


def run_speeds(options: Speed) -> None:
    """Time the base's own `generate`, and the twig's parts that the options name."""
    chain: dict[str, Any] = {"draft_length": options.draft_length, "draft_threshold": options.draft_threshold}
    tree: dict[str, Any] = {
        name: getattr(options, name) for name in ("tree_depth", "tree_width", "tree_expand", "tree_nodes")
    }
    SpeculationConfig("chain", **chain)  # for their errors
    SpeculationConfig("tree", **tree)
    systems = standard_systems(options.retain, chain, tree, options.baselines, options.contenders)
    _run_contenders(options, "Speed", systems)


def run_drafts(options: Drafts) -> None:
    """Time chains of every length and threshold."""
    for length in options.lengths:
        for threshold in options.thresholds:
            SpeculationConfig("chain", length, threshold)  # for its errors
    systems = draft_systems(options.retain, options.lengths, options.thresholds)
    _run_contenders(options, "Drafts", systems, validation="choosing δ and θ")


def _run_contenders(options: Speed | Drafts, title: str, systems: Sequence[System], validation: str = "") -> None:
    repeats = options.repeats
    _check_repeats(repeats)
    bench = open_bench(options, validation)
    model = bench.grow()
    plan = [dataclasses.asdict(system) for system in systems]
    more = {"repeats": repeats, **_machine()}
    results_log = ResultsLog(options.output / RAW, {**bench.settings, **more, "systems": plan})
    with _advancing(title, len(bench.questions.items)) as advance:
        records = run_speed(
            model,
            bench.processor.tokenizer,
            bench.questions.items,
            systems,
            bench.inputs_of,
            results_log,
            options.max_new_tokens,
            options.max_description_tokens,
            repeats,
            advance,
        )
    _write(options, title, bench, more, speed_sections(answered(records), systems), records)


def run_sizes(options: Batches) -> None:
    """Time every system on batches of every size."""
    _check_repeats(options.repeats)
    bench = open_bench(options)
    questions = bench.questions.items
    batches = sum(len(split(questions, size)) for size in options.sizes)
    systems = batch_systems(options.retain, options.baselines)
    plan = [dataclasses.asdict(system) for system in systems]
    # Batches have no names of their own: which prompts they hold follows from the kinds.
    more = {"repeats": options.repeats, **_machine(), "kinds": options.kinds}
    results_log = ResultsLog(options.output / RAW, {**bench.settings, **more, "systems": plan})
    model = bench.grow()
    with _advancing("Batches", batches) as advance:
        records = run_batches(
            model,
            questions,
            options.sizes,
            systems,
            lambda batch: bench.inputs_of(*batch),
            results_log,
            options.max_new_tokens,
            options.max_description_tokens,
            options.repeats,
            advance,
        )
    _write(options, "Batches", bench, more, batch_sections(answered(records), systems), records)


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise TwigVLMError(f"repeats={repeats}: must be 1 or more")


def run_checks(options: Exactness) -> None:
    """Compare answers that must be the same."""
    checks = choose_checks(options.checks)
    bench = open_bench(options)
    results_log = ResultsLog(options.output / RAW, {**bench.settings, "retain": options.retain, "checks": checks})
    todo = sum(results_log.results(question.id) is None for question in bench.questions.items)
    inputs_of: InputsOf = bench.inputs_of
    with _advancing("Exactness", 2 * todo) as advance:
        records = run_exactness(
            bench.base,
            bench.grow,
            bench.questions.items,
            inputs_of,
            results_log,
            options.retain,
            checks,
            options.max_new_tokens,
            options.max_description_tokens,
            advance,
        )
    more = {"retain": options.retain}
    _write(options, "Exactness", bench, more, exactness_sections(answered(records)), records)


@contextmanager
def _advancing(title: str, total: int, running: Progress | None = None) -> Iterator[Callable[[Record], None]]:
    """A progress bar with running accuracies; a line now and then where stderr is no terminal, and for what failed."""
    done = failed = 0
    with progress() as bar:
        task = bar.add_task(title, total=total)

        def advance(record: Record) -> None:
            nonlocal done, failed
            done += 1
            if "failed" in record:
                failed += 1
                print(f"{record['id']}: failed, {record['failed']}", file=sys.stderr)
            text = title
            if running is not None:
                running.add(record)
                text = f"{title}: {running}"
            if failed:
                text = f"{text} · {failed} failed"
            bar.update(task, advance=1, description=text)
            if bar.disable and (done % _EVERY == 0 or done == total):
                print(f"{done}/{total} {text}", file=sys.stderr)

        yield advance


def command_line(options: Common) -> str:
    """The command that asks for these options."""
    words = ["twigvlm", "evaluate", type(options).__name__.lower()]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        words.append(f"--{field.name.replace('_', '-')}")
        if isinstance(value, tuple):
            words += [f"{one:g}" if isinstance(one, float) else str(one) for one in value]
        elif not isinstance(value, bool):
            words.append(str(value))
    return shlex.join(words)


def _write(
    options: Common,
    title: str,
    bench: Bench,
    more: dict[str, Any],
    sections: Sequence[str],
    records: Sequence[Record],
) -> None:
    split = bench.questions.split
    settings = {
        **bench.settings,
        **more,
        "number of questions": f"{len(bench.questions.items)}{f', {split} split' if split else ''}",
        **_machine(),
    }
    path = options.output / REPORT
    with replacing(path) as temporary:
        text = page(title, command_line(options), settings, [*failed_sections(records), *sections])
        temporary.write_text(text, encoding="utf-8")
    print(f"Raw results: {options.output / RAW}")
    print(f"Report: {path}")
