"""What all evaluations share: loading, progress, and writing raw results and the report."""

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
import transformers

from twigvlm.base.vlm import BaseVLM
from twigvlm.checkpoints.hub import fetch
from twigvlm.checkpoints.twig_files import FILES, WEIGHTS, digest, fingerprint
from twigvlm.cli.evaluate.options import RAW, REPORT, EvaluateOptions
from twigvlm.cli.output import busy, check_directory, steps
from twigvlm.cli.session import build_inputs, load_base
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.assisted import check_assistant
from twigvlm.evaluation.progress import Progress
from twigvlm.evaluation.questions import Question, Questions, load_questions
from twigvlm.evaluation.report import failed_sections, page
from twigvlm.evaluation.results_log import Record, ResultsLog
from twigvlm.files import replacing
from twigvlm.loading import default_twig, without_twig
from twigvlm.model import TwigVLM
from twigvlm.pruning.methods import method_files
from twigvlm.speculation.costs import processor_name


@dataclasses.dataclass(frozen=True)
class Bench:
    """A loaded base, the twig's directory, and the questions."""

    base: Any
    body: BaseVLM
    """The base as a `BaseVLM`."""
    processor: Any
    twig: str | None
    """Directory of the twig; None: there is none, for methods that need none."""
    questions: Questions
    settings: dict[str, Any]
    """Settings that every result depends on."""

    def grow(self, exits: bool = False) -> TwigVLM:
        """The base as a TwigVLM, with its twig if there is one. Without a twig, `exits` says whether it drafts by early exit."""
        if self.twig is None:
            return without_twig(self.base, exits)
        return TwigVLM.from_pretrained(self.base, self.twig)

    def load_assistant(self, name: str, options: EvaluateOptions) -> Any:
        """Load a small model that drafts for the base's own `generate`.

        Raises:
            TwigVLMError: it cannot be loaded, or its drafts would be of no use to the base.
        """
        with busy(f"Loading {name}"):
            assistant, _ = load_base(name, options.dtype, options.device)
        check_assistant(self.body, assistant, name)
        return assistant

    def inputs_of(self, *questions: Question) -> dict[str, Any]:
        """The base's inputs for a question, or for several as a batch.

        Raises:
            TwigVLMError: a picture cannot be read, the processor or its template refuses, or the context is too short.
        """
        images = [question.image for question in questions]
        inputs = build_inputs(self.base, self.processor, images, [question.prompt for question in questions])
        self.body.check_context(inputs["input_ids"])
        return inputs


def open_bench(options: EvaluateOptions, validation: str = "", needs_twig: bool = True) -> Bench:
    """Load what the options name.

    Args:
        options: options of the command.
        validation: what the evaluation is used to choose, so that the test split is refused; empty: nothing is chosen.
        needs_twig: whether a base without a twig is refused.
    """
    check_directory(options.output, "output")
    for name in ("max_new_tokens", "max_description_tokens"):
        if getattr(options, name) < 1:
            raise TwigVLMError(f"{name}={getattr(options, name)}: must be 1 or more")
    everything = load_questions(options.questions)
    if validation:
        everything.refuse_test(validation)
    questions = everything.chosen(options.kinds, options.limit)
    twig = options.twig or default_twig(options.model)
    if twig is None and needs_twig:
        raise TwigVLMError(
            f"model {options.model!r}: needs a twig; give --twig DIR, or name only methods and ways to draft that need none"
        )
    weights = None if twig is None else fetch(twig, FILES, None, None) / WEIGHTS
    if weights is not None and not weights.is_file():
        raise TwigVLMError(f"twig {twig!r}: no twig here ({WEIGHTS} is missing); give a directory made by training")
    with busy(f"Loading {options.model}"):
        base, processor = load_base(options.model, options.dtype, options.device)
    if options.attention != "auto":
        base.set_attn_implementation(options.attention)  # before a twig grows: it takes its base's
    body = BaseVLM(base)
    settings = {
        "model": _digest(json.dumps(fingerprint(body), sort_keys=True).encode()),
        "twig": "none" if weights is None else digest(weights.parent),
        "questions": _digest(options.questions.read_bytes()),
        "processor": _digest(f"{processor.to_json_string()}{processor.chat_template}".encode()),
        "dtype": str(base.dtype).removeprefix("torch."),
        "attention": body.attention,
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else base.device.type,
        "max new tokens": options.max_new_tokens,
        "max description tokens": options.max_description_tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "twigvlm": version("twigvlm"),
    }
    return Bench(base, body, processor, twig, questions, settings)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Settings of this machine that times depend on, in addition to `Bench.settings`."""
    processor, instructions = processor_name(), torch.backends.cpu.get_cpu_capability()
    return {"threads": torch.get_num_threads(), "CPU": f"{processor} ({instructions})"}


RECORDS = 5
"""Version of the records; results of another version cannot be continued. Older records of this version lack `looks` and `steps`;
reports of these leave out the cost of refocusing."""


def open_log(options: EvaluateOptions, settings: dict[str, Any], methods: Iterable[str], file: str = RAW) -> ResultsLog:
    """Open the raw results in the output directory.

    Args:
        options: options of the command.
        settings: settings that the results depend on.
        methods: names of the pruning methods; the contents of files that they read become settings too.
        file: name of the file of results.
    """
    files = method_files(methods)
    return ResultsLog(options.output / file, {**settings, **({"files": files} if files else {}), "records": RECORDS})


@contextmanager
def showing(
    title: str, ids: Iterable[str], log: ResultsLog, passes: int = 1, accuracies: Progress | None = None
) -> Iterator[Callable[[Record], None]]:
    """Show progress with the time left, and print a line for each question that fails.

    Args:
        title: title of the evaluation.
        ids: ids of the records that the evaluation makes.
        log: log of the results, whose records count as done.
        passes: number of times that each record is reported.
        accuracies: accuracies to show while the evaluation runs; None: none are shown.

    Yields:
        A function to call with each record, including those that the log had already.
    """
    ids = list(ids)
    held, failed = {identity for identity in ids if log.results(identity) is not None}, 0
    with steps(title, passes * len(ids), done=passes * len(held)) as advance:

        def show(record: Record) -> None:
            nonlocal failed
            if "failed" in record:
                failed += 1
                print(f"{record['id']}: failed, {record['failed']}", file=sys.stderr)
            text = f"{title}, {failed} failed" if failed else title
            if accuracies is not None:
                accuracies.add(record)
                text = f"{text}: {accuracies}"
            advance(text, count=record.get("id") not in held)

        yield show


def command_line(options: EvaluateOptions) -> str:
    """The command line that gives these options."""
    words = ["twigvlm", *options.name.split()]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        words.append(f"--{'no-' if value is False else ''}{field.name.replace('_', '-')}")
        if isinstance(value, tuple):
            words += [f"{item:g}" if isinstance(item, float) else str(item) for item in value]
        elif not isinstance(value, bool):
            words.append(str(value))
    return shlex.join(words)


def write_report(
    options: EvaluateOptions,
    title: str,
    bench: Bench,
    more: dict[str, Any],
    sections: Sequence[str],
    records: Sequence[Record],
) -> None:
    """Write the report, and print where the files are. `more` has the settings of this evaluation only."""
    split = bench.questions.split
    settings = {
        **bench.settings,
        **more,
        "number of questions": f"{len(bench.questions.items)}{f', {split} split' if split else ''}",
    }
    path = options.output / REPORT
    with replacing(path) as temporary:
        text = page(title, command_line(options), settings, [*failed_sections(records), *sections])
        temporary.write_text(text, encoding="utf-8")
    print(f"Raw results: {options.output / RAW}")
    print(f"Report: {path}")
