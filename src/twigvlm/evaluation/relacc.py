"""RelAcc from the result files of lmms-eval, in the layout of the paper's Table 1.

A run is a folder of `*_results.json`, written by one or more commands of lmms-eval with the same `--model_args`; the newest
result of each task counts. Every run is compared with the base's own run, task by task, so the setup of a benchmark does not
matter as long as it is the same for both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.benchmarks import BENCHMARKS
from twigvlm.evaluation.metrics import relative_accuracy
from twigvlm.evaluation.report import percent, table

PROTOCOL: Final[Mapping[str, str]] = {
    "pretrained": "sapling",
    "pad": "false",
    "system": "",
    "dtype": "auto",
    "frames": "none",
    "max_new_tokens": "128",
}
"""Model arguments that must be the same in a run and in the base's run, with their defaults. `attention` may differ, because the
base should be measured with its fastest implementation."""
BASE_ARGUMENTS: Final[Mapping[str, str]] = {"method": "none", "retain": "none", "speculate": "none"}
"""Model arguments that the base's own run, without pruning or drafts, must have; also their defaults."""
LEGEND: Final = (
    "Score · RelAcc in percent of the base. R̄ measured: visual tokens per layer, mean over the answers. Chosen again, "
    "where a method refocuses: visual tokens that ran through the pruned layers beside R̄, mean over the answers. RelSpd: tokens "
    "per second over the base's, by the sums of tokens and times (sums) and by the means over answers (means)."
)
_AGAIN: Final = "avg_visual_tokens_again"


@dataclass(frozen=True)
class Run:
    """The results of one setting."""

    name: str
    """File or folder that it was read from."""
    settings: dict[str, str]
    """The model arguments."""
    scores: dict[str, float]
    """Score by task, in the task's own unit."""
    samples: dict[str, int]
    """Number of questions by task."""
    timed: frozenset[str]
    """Tasks on which the speed was measured."""
    throughput: dict[str, float]
    """Figures of speed, from lmms-eval and from `figures.throughput`; empty if there are none."""
    batch_sizes: frozenset[str]
    """Batch sizes of the run's commands."""
    generation: frozenset[str]
    """Values of lmms-eval's `--gen_kwargs`, which change the tasks' options; `none`: it was not given."""

    @property
    def method(self) -> str:
        """The pruning method with the name of its twig, and the way to draft, as text."""
        method, speculate = (_plain(self.settings.get(name, "none")) for name in ("method", "speculate"))
        pruned = "twig" if method == "none" and self.budget else method
        if "twig" in self.settings:
            pruned += f" ({Path(self.settings['twig']).name})"
        return pruned if speculate == "none" else f"{pruned}, {speculate}"

    @property
    def budget(self) -> str:
        """R̄ as requested; empty without pruning."""
        budget = _plain(self.settings.get("retain", "none"))
        return "" if budget == "none" else budget


def read_run(path: Path) -> Run:
    """Read a run from its result file, or from all result files in a folder.

    Raises:
        TwigVLMError: there is no result file, a file is broken, or their settings differ.
    """
    files = sorted(path.rglob("*_results.json"), key=lambda file: file.name) if path.is_dir() else [path]
    if not files:
        raise TwigVLMError(f"run {str(path)!r}: holds no *_results.json; give what lmms-eval got as --output_path")
    records = [_read(file) for file in files]
    settings = _settings(records[-1])
    for file, record in zip(files, records, strict=True):
        if _settings(record) != settings:
            raise TwigVLMError(
                f"run {str(path)!r}: {file.name} is of other model arguments than {files[-1].name}; give each setting "
                "an --output_path of its own"
            )
    newest = {task: record for record in records for task in record["n-samples"]}  # names begin with their dates
    used = [record for record in records if any(record is one for one in newest.values())]
    return Run(
        str(path),
        settings,
        {task: _score(record, task) for task, record in newest.items()},
        {task: int(record["n-samples"][task]["effective"]) for task, record in newest.items()},
        frozenset(task for record in used for task in record["n-samples"]),
        _throughput(used),
        frozenset(str(record["config"].get("batch_size", 1)) for record in used),
        frozenset(json.dumps(record["config"].get("gen_kwargs") or "none", sort_keys=True) for record in used),
    )


def relacc_table(base: Run, runs: Sequence[Run], tasks: Sequence[str] = ()) -> str:
    """A markdown table: a row per run, grouped by budget, a column per task (score · RelAcc), then mean RelAcc, R̄ and speed.

    Args:
        base: the run without pruning, to which the others are compared.
        runs: the runs to compare.
        tasks: tasks to compare; none given: all tasks of the base's run.

    Raises:
        TwigVLMError: the base's run is pruned or drafted, or a run lacks a task, was asked other questions, or has another base
            or protocol.
    """
    for name, default in BASE_ARGUMENTS.items():
        if _plain(base.settings.get(name, default)) != default:
            raise TwigVLMError(
                f"run {base.name!r}: has {name}={base.settings[name]}; the first run must be the base's own, without pruning and "
                "drafts"
            )
    known = list(BENCHMARKS)
    chosen = list(tasks) or sorted(base.scores, key=lambda task: known.index(task) if task in known else len(known))
    for run in (base, *runs):
        _check(run, base, chosen)
    columns = [BENCHMARKS[task].column if task in BENCHMARKS else task for task in chosen]
    again = any(_AGAIN in run.throughput for run in runs)
    head = ["method", *(f"{column} · RelAcc" for column in columns), "RelAcc, %", "R̄ measured"]
    head += [*(["chosen again"] if again else []), "tokens/s", "RelSpd (sums)", "RelSpd (means)"]
    rows = [_row("**base**", base, base, chosen, again)]
    # The largest budget first, as in the paper; what was not pruned before all.
    budgets = sorted({run.budget for run in runs}, key=lambda text: (bool(text), -_number(text)))
    for budget in budgets:
        rows.append([f"**R̄ {budget}**" if budget else "**no pruning**", *[""] * (len(head) - 1)])
        members = [run for run in runs if run.budget == budget]
        rows += [_row(label, run, base, chosen, again) for label, run in zip(_labels(members), members, strict=True)]
    return table(head, rows)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Labels of runs: the method; for several runs of one method also the arguments that differ or, if none do, their names."""
    labels = []
    for run in runs:
        same = [other for other in runs if other.method == run.method]
        differing = [
            f"{name}={value}"
            for name, value in run.settings.items()
            if name not in (*PROTOCOL, *BASE_ARGUMENTS)
            and any(_plain(other.settings.get(name, "")) != _plain(value) for other in same)
        ]
        labels.append(", ".join([run.method, *differing]))
    return [
        label if labels.count(label) == 1 else f"{label}, {run.name}" for label, run in zip(labels, runs, strict=True)
    ]


def _row(label: str, run: Run, base: Run, tasks: Sequence[str], again: bool) -> list[str]:
    ratios = [relative_accuracy([run.scores[task]], [base.scores[task]]) for task in tasks]
    cells = [
        f"{run.scores[task] * BENCHMARKS[task].scale:.1f} · {percent(ratio)}"
        if task in BENCHMARKS
        else f"{run.scores[task]:.4g} · {percent(ratio)}"
        for task, ratio in zip(tasks, ratios, strict=True)
    ]
    shown = ["avg_visual_tokens", *([_AGAIN] if again else []), "avg_speed"]
    return [
        label,
        *cells,
        percent(sum(ratios) / len(ratios)),
        *(f"{run.throughput[figure]:.1f}" if figure in run.throughput else "–" for figure in shown),
        _relative("avg_speed", run, base),
        _relative("avg_answer_speed", run, base),
    ]


def _relative(figure: str, run: Run, base: Run) -> str:
    """A figure of speed divided by the base's; a dash unless both were measured on the same tasks and batch size."""
    mine, its = run.throughput.get(figure), base.throughput.get(figure)
    alike = run.timed == base.timed and run.batch_sizes == base.batch_sizes
    return f"{mine / its:.2f}" if mine and its and alike else "–"


def _check(run: Run, base: Run, tasks: Sequence[str]) -> None:
    if not tasks:
        raise TwigVLMError(f"run {base.name!r}: holds no task; run lmms-eval with --tasks")
    if missing := [task for task in tasks if task not in run.scores]:
        raise TwigVLMError(
            f"run {run.name!r}: has no result of {', '.join(missing)}; run them, or name those to compare by --tasks"
        )
    for task in tasks:
        if run.samples[task] != base.samples[task]:
            raise TwigVLMError(
                f"run {run.name!r}: {run.samples[task]} questions of {task}, where the base was asked "
                f"{base.samples[task]}; use the same --limit"
            )
    if run.generation != base.generation:
        mine, its = (", ".join(sorted(one.generation)) for one in (run, base))
        raise TwigVLMError(
            f"run {run.name!r}: gen_kwargs={mine}, where the base has gen_kwargs={its}; compare runs of one protocol"
        )
    for name, default in PROTOCOL.items():
        mine, its = (_plain(one.settings.get(name, default)) for one in (run, base))
        if mine != its:
            raise TwigVLMError(
                f"run {run.name!r}: {name}={mine}, where the base has {name}={its}; compare runs of one protocol"
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not {"results", "n-samples", "config"} <= record.keys():
            raise ValueError("it has not the fields of lmms-eval")
    except (OSError, ValueError, AttributeError) as error:
        raise TwigVLMError(
            f"run {str(file)!r}: no result file of lmms-eval ({error}); give what it got as --output_path"
        ) from None
    return dict(record)


def _settings(record: Mapping[str, Any]) -> dict[str, str]:
    given = record["config"].get("model_args") or {}
    if isinstance(given, str):
        given = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    return {name: str(value) for name, value in given.items()}


def _score(record: Mapping[str, Any], task: str) -> float:
    """The score of a task; lmms-eval's keys are `metric,filter`."""
    found = {
        key.partition(",")[0]: float(value)
        for key, value in record["results"][task].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    better = record.get("higher_is_better", {}).get(task, {})
    metrics = BENCHMARKS[task].metrics if task in BENCHMARKS else [name for name in better if name in found][:1]
    if not metrics or any(name not in found or better.get(name) is False for name in metrics):
        raise TwigVLMError(
            f"task {task!r}: has no score of which more is better, so it has no RelAcc; name others by --tasks"
        )
    return sum(found[name] for name in metrics)


def _throughput(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Combine the figures of several commands: speeds as ratios of sums, others as means weighted by questions."""
    given = [record.get("throughput") or {} for record in records]
    if not all(given):
        return {}
    weights = [sum(int(each["effective"]) for each in record["n-samples"].values()) for record in records]
    names = set.intersection(*(set(one) for one in given))
    mean = {
        name: sum(weight * float(one[name]) for weight, one in zip(weights, given, strict=True)) / sum(weights)
        for name in names
    }
    tokens, seconds = (sum(float(one[name]) for one in given) for name in ("total_gen_tokens", "total_elapsed_time"))
    return {**mean, "avg_speed": tokens / seconds} if seconds else mean


def _plain(text: str) -> str:
    """A model argument as text, the same for equal values such as 64 and 64.0, or true and True."""
    number, share = text.removesuffix("%"), "%" if text.endswith("%") else ""
    try:
        return f"{float(number):g}{share}"
    except ValueError:
        return text.lower() if text.lower() in ("true", "false", "none") else text


def _number(text: str) -> float:
    try:
        return float(text.rstrip("%"))
    except ValueError:
        return 0.0
