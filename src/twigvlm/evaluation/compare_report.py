"""A comparison as markdown tables."""

from collections.abc import Callable, Sequence
from math import isnan

from twigvlm.evaluation.compare import BASE, LENGTHS, Line, Times
from twigvlm.evaluation.published import published
from twigvlm.evaluation.report import number, percent, quality_cell, span, table
from twigvlm.evaluation.summary import Accuracy

_DASH = "–"


def comparison_sections(lines: Sequence[Line], pruning_head: bool, figure: str | None = None) -> list[str]:
    """Sections of the report: the table, the picture, and details of the timed answers.

    Args:
        lines: lines of `compare`, the base first.
        pruning_head: whether the twig has a P-Head.
        figure: path of the picture relative to the report; None: there is no picture.
    """
    lengths = [length for length in LENGTHS if length in lines[0].quality]
    columns = {"method": _method, "R̄ asked": _asked, "R̄": lambda line: f"{line.average:.1f}"}
    for length in lengths:
        again = any(line.quality[length].ran for line in lines)
        columns |= _columns(length, again, timed=length in lines[0].times)
    # Before the first speed, beside the RelAcc of the same kind.
    names = list(columns)
    names.insert(names.index(f"{lengths[0]}: RelAcc, %") + 1, "published, %")
    columns["published, %"] = lambda line: published(line.combination.variant, pruning_head) or _DASH
    if any(not isnan(line.peak) for line in lines):
        columns["peak, MiB"] = lambda line: number(line.peak / 2**20, 0)
        names.append("peak, MiB")
    rows = [[columns[name](line) for name in names] for line in lines]
    sections = ["## Comparison", _explained(lines, lengths), table(names, rows)]
    if figure is not None:
        sections.append(f"![RelAcc over visual tokens and over the time of an answer]({figure})")
    for length in lengths:
        if length in lines[0].times:
            sections += _timed_sections(lines, length)
    return sections


def _method(line: Line) -> str:
    return f"**{line.combination.label}**" if line.combination == BASE else line.combination.label


def _asked(line: Line) -> str:
    retain = line.combination.variant.retain
    return _DASH if retain is None else f"{retain:g}"


def _columns(length: str, again: bool, timed: bool) -> dict[str, Callable[[Line], str]]:
    """Columns for answers of one length: heading -> function that gives the cell of a line.

    Args:
        length: one of `LENGTHS`.
        again: whether any combination chose visual tokens again while its answer grew.
        timed: whether there are times.
    """

    def accuracy(line: Line) -> Accuracy:
        return line.quality[length]

    def times(line: Line) -> Times:
        return line.times[length]

    columns: dict[str, Callable[[Line], str]] = {
        f"{length}: quality, %": lambda line: quality_cell(accuracy(line)),
        f"{length}: RelAcc, %": lambda line: percent(accuracy(line).relative) + span(accuracy(line).interval),
    }
    if again:
        columns[f"{length}: chosen again"] = lambda line: _again(accuracy(line))
    if timed:
        columns |= {
            f"{length}: tokens/s": lambda line: f"{times(line).speed.speed:.1f}",
            f"{length}: speed ratio": lambda line: f"{times(line).relative:.2f}{span(times(line).interval, 1, 2)}",
            f"{length}: prefill, decode ratios": lambda line: (
                f"{number(times(line).prefill, 2)}, {number(times(line).decode, 2)}"
            ),
        }
    return columns


def _explained(lines: Sequence[Line], lengths: Sequence[str]) -> str:
    text = (
        "R̄ is the true one by one rule for all methods, mean over prompts. Quality: exact match, objects named "
        "(recall/precision) and texts quoted by descriptions. RelAcc: exact matches relative to the base without pruning, with "
        "the paired 95 % bootstrap interval over pictures (from 10 on). Published: RelAcc of LLaVA-1.5-7B on six benchmarks "
        "(Table 1 of arXiv 2503.14075 v3; another model, other questions)."
    )
    if any(quality.ran for line in lines for quality in line.quality.values()):
        text += (
            " Chosen again: visual tokens that ran through the pruned layers beside R̄, while an answer grew, mean per answer, "
            "and the share of the steps of decoding in which that happened."
        )
    if not lines[0].times:
        return text
    counted = " and ".join(f"{lines[0].times[length].count} {length}" for length in lengths if length in lines[0].times)
    return (
        f"{text} Times are of {counted} answers, one prompt at a time, all of them in turn on each question. Ratios are "
        "medians over questions, above 1 faster than the base's own `generate` on the same question (the faster of its attention "
        "implementations): tokens per second, the time to the first token, and the time of each further one. Own loop: this "
        "library's loop, which neither prunes nor drafts; its gain is in every line below it. Peak: most memory held at once, "
        "with all weights, the twig's included."
    )


def _timed_sections(lines: Sequence[Line], length: str) -> list[str]:
    rows = []
    for line in lines:
        times = line.times[length]
        speed = times.speed
        per_token = speed.decode / (speed.tokens - 1) if speed.tokens > 1 else float("nan")
        rows.append(
            [
                _method(line),
                _asked(line),
                quality_cell(speed),
                f"{speed.tokens:.1f}",
                number(1000 * speed.prefill, 1),
                number(1000 * per_token, 2),
                percent(speed.acceptance),
                number(speed.accepted_length, 2),
                _DASH if times.different is None else str(times.different),
            ]
        )
    head = ["method", "R̄ asked", "quality, %", "tokens", "prefill, ms", "decode, ms a token", "TokAR, %"]
    head += ["accepted per step", "different"]
    return [
        f"## Timed {length} answers",
        f"The {lines[0].times[length].count} {length} answers that were timed, with their own quality; means over questions. "
        "Different: answers that are not the same text as the one whose quality the first table holds, which was given "
        "without drafts beside the other methods' answers.",
        table(head, rows),
    ]


def _again(one: Accuracy) -> str:
    """Visual tokens chosen again, and the share of the steps in which that happened, if known."""
    return f"{one.ran:.0f}" + ("" if isnan(one.again) else f", {percent(one.again)} % of steps")
