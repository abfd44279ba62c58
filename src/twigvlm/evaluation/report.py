"""Reports: raw records as markdown tables."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from twigvlm.evaluation.exactness import CHECKS
from twigvlm.evaluation.results_log import Record
from twigvlm.evaluation.summary import (
    Accuracy,
    Interval,
    Quality,
    compare_batches,
    compare_speeds,
    faster,
)
from twigvlm.evaluation.systems import System
from twigvlm.evaluation.variants import NONE, Variant

_LISTED = 20  # failed questions that a report gives the reasons of; the raw results have all


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").splitlines())


def number(value: float, digits: int) -> str:
    """A number with this many decimal places; a dash for nan."""
    return "–" if isnan(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """A share from 0 to 1 in percent; a dash for nan."""
    return number(100 * share, 1)


def span(interval: Interval, scale: float = 100.0, digits: int = 1) -> str:
    """An interval as text to follow its figure; empty for nan."""
    if isnan(interval[0]):
        return ""
    return f" [{scale * interval[0]:.{digits}f}, {scale * interval[1]:.{digits}f}]"


def page(title: str, command: str, settings: Mapping[str, Any], sections: Sequence[str]) -> str:
    """A report in markdown: title, command, settings and sections."""
    about = table(["setting", "value"], [[name, _value(value)] for name, value in settings.items()])
    return "\n\n".join([f"# {title}", f"```\n{command}\n```", about, *sections]) + "\n"


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def failed_sections(records: Sequence[Record], title: str = "Failed") -> list[str]:
    """A section with the number of failed questions and the reasons; empty if none failed."""
    failed = [f"- {record['id']}: {record['failed']}" for record in records if "failed" in record]
    if not failed:
        return []
    return [
        f"## {title}",
        f"{len(failed)} of {len(records)} could not be asked. The figures leave them out; they are asked again when the same "
        "command is run again.",
        "\n".join([*failed[:_LISTED], *(["- …"] if len(failed) > _LISTED else [])]),
    ]


def accuracy_sections(accuracies: Sequence[Accuracy], variants: Sequence[Variant]) -> list[str]:
    """Sections with the accuracy per method and budget, per kind of question, and of descriptions."""
    figures = {one.name: one for one in accuracies}
    base = figures[NONE.name]
    sections = []
    if base.kinds:
        asked = sum(count for count, _ in base.kinds.values())
        sections += [
            "## Accuracy",
            f"Exact match of {asked} answers in percent, and RelAcc (the base without pruning: 100) with its paired "
            "95 % bootstrap interval, over pictures (from 10 on). Without pruning: "
            f"**{percent(base.exact)} %** at {base.kept:g} visual tokens.",
            _by_budget(figures, variants),
            "## Accuracy by kind of question",
            _by_kind(list(figures.values()), base),
        ]
    if not isnan(base.recall):
        sections += _descriptions(list(figures.values()))
    return sections


def _descriptions(figures: Sequence[Accuracy]) -> list[str]:
    """A table of what descriptions name and quote, and of the cost of refocusing."""
    text = (
        "Objects named (recall, precision) and texts quoted, in percent; and of all answers, visual tokens that were chosen "
        "again, mean per answer"
    )
    head = ["pruning", "recall", "precision", "texts", "chosen again"]
    rows = [
        [_label(one.name), percent(one.recall), percent(one.precision), percent(one.read), f"{one.ran:.0f}"]
        for one in figures
    ]
    if any(not isnan(one.again) for one in figures):
        text += ", and the share of the steps of decoding in which that happened"
        head.append("in steps, %")
        rows = [[*row, percent(one.again)] for row, one in zip(rows, figures, strict=True)]
    return ["## Descriptions", f"{text}.", table(head, rows)]


def _label(name: str) -> str:
    method, _, settings = name.rpartition("@")
    parts = [method, *settings.split("/")] if method else [name]
    return ", ".join(f"{label}{part}" for label, part in zip(("", "R̄ ", "K_f ", "φ "), parts, strict=False))


def _by_budget(figures: Mapping[str, Accuracy], variants: Sequence[Variant]) -> str:
    """A table with a row per method, K_f and φ, and a column per budget."""
    budgets = list(dict.fromkeys(v.retain for v in variants if v.retain is not None))
    by_place = {(*v.way, v.retain): figures[v.name] for v in variants}
    rows = []
    for way in dict.fromkeys(v.way for v in variants if v.retain is not None):
        cells = []
        for budget in budgets:
            one = by_place[(*way, budget)]
            cells.append(f"{percent(one.exact)} · {percent(one.relative)}{span(one.interval)} · R {one.kept:g}")
        method, final_wipe, final_share = way
        rows.append([method, *(["", ""] if final_wipe is None else [str(final_wipe), f"{final_share:g}"]), *cells])
    return table(["method", "K_f", "φ", *(f"R̄ {budget:g}: exact · RelAcc · R" for budget in budgets)], rows)


def _by_kind(figures: Sequence[Accuracy], base: Accuracy) -> str:
    head = ["pruning", *(f"{kind} ({count})" for kind, (count, _) in base.kinds.items())]
    return table(head, [[_label(one.name), *(percent(right) for _, right in one.kinds.values())] for one in figures])


def quality_cell(one: Quality) -> str:
    """A table cell with the quality of a system's answers."""
    parts = []
    if not isnan(one.exact):
        parts.append(f"exact {percent(one.exact)}")
    if not isnan(one.recall):
        parts.append(f"objects {percent(one.recall)}/{percent(one.precision)}")
    if not isnan(one.read):
        parts.append(f"texts {percent(one.read)}")
    return ", ".join(parts)


def speed_sections(records: Sequence[Record], systems: Sequence[System]) -> list[str]:
    """Sections with tokens per second, RelSpd relative to the fastest baseline, parts of the time, and drafts."""
    baselines = [one.name for one in systems if one.is_baseline] or [systems[0].name]
    baseline = faster(records, baselines)
    figures = compare_speeds(records, baseline, {one.name: one.same_as for one in systems})
    rows = [
        [
            f"**{one.name}** (baseline)" if one.name == baseline else one.name,
            f"{one.tokens:.1f}",
            f"{one.speed:.1f}",
            f"{one.relative:.2f}{span(one.interval, 1, 2)}",
            quality_cell(one),
            f"{one.relative_prefill:.2f}",
            *(number(1000 * seconds, 1) for seconds in (one.prefill, one.decode, one.draft, one.verify)),
            percent(one.acceptance),
            number(one.accepted_length, 2),
            "–" if one.different is None else str(one.different),
        ]
        for one in figures
    ]
    head = ["system", "tokens", "tokens/s", "RelSpd", "quality, %", "prefill ratio", "prefill, ms", "decode, ms"]
    head += ["draft, ms", "verify, ms", "TokAR, %", "accepted per step", "different outputs"]
    repeats, refocusing = len(records[0]["runs"][baseline]["total"]), ""
    if any(not isnan(one.ran) for one in figures):
        head += ["chosen again", "in steps, %"]
        cells = [[number(one.ran, 0), percent(one.again)] for one in figures]
        rows = [row + more for row, more in zip(rows, cells, strict=True)]
        refocusing = (
            " Chosen again: visual tokens that ran through the pruned layers while an answer grew, mean per answer, and the "
            "share of the steps of decoding in which that happened."
        )
    return [
        "## Speed",
        f"{len(records)} prompts, {repeats} alternating repeats after a warm-up; per prompt the median over repeats, then the "
        "mean over prompts. RelSpd is the ratio of tokens per second (prefill and decoding) to the baseline's on the same "
        "prompt, with its paired 95 % bootstrap interval over pictures (from 10 on). The prefill ratio is the baseline's mean "
        "prefill time over a system's; draft and verify are parts of decode. Different outputs: prompts where speculation did "
        "not repeat what the same pruning gives without it. Quality is that of the same answers: exact match, objects named "
        f"(recall/precision) and texts quoted by descriptions.{refocusing}",
        table(head, rows),
    ]


def batch_sections(records: Sequence[Record], systems: Sequence[System]) -> list[str]:
    """Sections with tokens per second and peak memory by system and batch size."""
    figures = compare_batches(records, [one.name for one in systems if one.is_baseline])
    sizes = list(dict.fromkeys(one.size for one in figures))
    rows = []
    for system in systems:
        cells = []
        for one in figures:
            if one.name == system.name:
                ratio = "**1.00**" if one.is_baseline else f"{one.relative:.2f}"
                held = "–" if isnan(one.peak) else f"{one.peak / 2**20:.0f} MiB"
                cells.append(f"{one.speed:.1f} · {ratio} · {held} · {quality_cell(one)}")
        rows.append([system.name, *cells])
    first = next(iter(records[0]["runs"].values()))
    counts = {size: sum(record["size"] for record in records if record["size"] == size) for size in sizes}
    prompts = f"{counts[sizes[0]]} prompts, the same at every size"
    if len(set(counts.values())) > 1:  # a question that fails takes all of its batch along
        prompts = " and ".join(f"{count} prompts at size {size}" for size, count in counts.items())
    return [
        "## Batches",
        f"{prompts}; {len(first['total'])} alternating repeats after a warm-up. New tokens per "
        "second of all rows together (median over repeats), their ratio to the faster baseline of the same size (bold), and "
        "the most memory held at once, weights included, those of the twig in all. Quality as of single prompts: exact match, "
        "objects named (recall/precision) and texts quoted.",
        table(["system", *(f"batch {size}: tokens/s · ratio · peak · quality, %" for size in sizes)], rows),
    ]


def exactness_sections(records: Sequence[Record]) -> list[str]:
    """A section with the number of prompts that passed each check."""
    different = {
        check: [record["id"] for record in records if not record["same"][check]] for check in records[0]["same"]
    }
    rows = [[CHECKS[check], f"{len(records) - len(ids)} of {len(records)}"] for check, ids in different.items()]
    failed = [f"- {CHECKS[check]}: {', '.join(ids)}" for check, ids in different.items() if ids]
    tokens = sum(record["tokens"] for record in records)
    text = f"{len(records)} prompts, answers of {tokens} tokens in all, compared token for token."
    return [
        "## Exactness",
        text,
        table(["check", "same"], rows),
        *(["Not the same:\n\n" + "\n".join(failed)] if failed else []),
    ]
