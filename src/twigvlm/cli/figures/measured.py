"""`twigvlm figures times`, `speeds` and `samples`: figures from raw results, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twigvlm.errors import TwigVLMError

if TYPE_CHECKING:
    from twigvlm.evaluation.results_log import Record
    from twigvlm.evaluation.summary import Speed


@dataclass(frozen=True, kw_only=True)
class FigureTimes:
    """Seconds of prefill and decoding by answer length (Fig. 3)."""

    results: Path
    """Raw results: results.jsonl of `evaluate speed`, or times.jsonl of `compare`."""
    systems: tuple[str, ...] = ()
    """Names of systems in the results. None given: all."""
    kinds: tuple[str, ...] = ()
    """Kinds of questions that count. None given: those with long answers, if there are any."""
    lengths: tuple[int, ...] = (10, 50, 100, 200)
    """New tokens of an answer; times are measured, and carried on to these lengths at the same time per token."""
    out: Path = Path("times.png")
    """Picture to write."""

    def run(self) -> None:
        """Draw and write the picture."""
        from twigvlm.evaluation.paper_figures import draw_times

        _check(self.out)
        if not self.lengths or min(self.lengths) < 1:
            raise TwigVLMError("lengths: must be one or more numbers of at least 1 token")
        records = _timed(self.results)
        kinds = [record["kind"] for record in records]
        chosen = _chosen("kind", self.kinds, list(dict.fromkeys(kinds)))
        records = [record for record in records if record["kind"] in chosen]
        if not self.kinds:
            records = [record for record in records if record["long"]] or records
        speeds = {one.name: one for one in _speeds(records, self.systems)}
        draw_times(speeds, self.lengths, self.out)
        print(f"Figure: {self.out}")


@dataclass(frozen=True, kw_only=True)
class FigureSpeeds:
    """Tokens per second relative to the base, as bars for short and for long answers (Fig. 6)."""

    results: Path
    """Raw results: results.jsonl of `evaluate speed`, or times.jsonl of `compare`."""
    systems: tuple[str, ...] = ()
    """Names of systems in the results. None given: all."""
    out: Path = Path("speeds.png")
    """Picture to write."""

    def run(self) -> None:
        """Draw and write the picture."""
        from twigvlm.evaluation.paper_figures import draw_speeds

        _check(self.out)
        panels: dict[str, list[Record]] = {}
        for record in _timed(self.results):
            panels.setdefault("long answers" if record["long"] else "short answers", []).append(record)
        draw_speeds({title: _speeds(records, self.systems) for title, records in sorted(panels.items())}, self.out)
        print(f"Figure: {self.out}")


@dataclass(frozen=True, kw_only=True)
class FigureSamples:
    """RelAcc by amount of training data (Fig. 7)."""

    results: tuple[str, ...]
    """SAMPLES=FILE for each twig: how many samples it was trained with, and results.jsonl of `evaluate accuracy` or `compare` on
    the same questions."""
    variants: tuple[str, ...] = ()
    """Names of variants in the results, such as twig@64/24. None given: all that prune."""
    out: Path = Path("samples.png")
    """Picture to write."""

    def run(self) -> None:
        """Draw and write the picture."""
        from twigvlm.evaluation.figures import undrawn
        from twigvlm.evaluation.paper_figures import draw_samples
        from twigvlm.evaluation.results_log import answered, read_records
        from twigvlm.evaluation.summary import accuracies
        from twigvlm.evaluation.variants import NONE

        _check(self.out)
        by_samples = {}
        for samples, path in _labelled(self.results):
            records = answered(read_records(path))
            if "score" not in records[0]:
                raise TwigVLMError(f"results {str(path)!r}: no answers; give results.jsonl of evaluate accuracy")
            by_samples[samples] = accuracies(records)
            if reason := undrawn(one for one in by_samples[samples] if one.name == NONE.name):
                raise TwigVLMError(f"results {str(path)!r}: {reason}; give results of other questions")
        common = set.intersection(*({one.name for one in figures} for figures in by_samples.values()))
        known = [one.name for one in next(iter(by_samples.values())) if one.name in common - {NONE.name}]
        draw_samples(by_samples, _chosen("variant", self.variants, known), self.out)
        print(f"Figure: {self.out}")


def _check(out: Path) -> None:
    from twigvlm.cli.output import check_picture_path
    from twigvlm.evaluation.figures import figure_class

    check_picture_path(out)
    figure_class()


def _labelled(given: Sequence[str]) -> list[tuple[int, Path]]:
    pairs = []
    for text in given:
        samples, _, path = text.partition("=")
        if not (samples.isdigit() and int(samples) and path):
            raise TwigVLMError(f"results {text!r}: must be SAMPLES=FILE, for example 10000=runs/small/results.jsonl")
        pairs.append((int(samples), Path(path)))
    if not pairs:
        raise TwigVLMError("results: none given; give SAMPLES=FILE, for example 10000=runs/small/results.jsonl")
    return pairs


def _chosen(what: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise TwigVLMError(f"{what} {name!r}: must be one of {', '.join(known)}")
    return [name for name in known if name in (names or known)]


def _timed(path: Path) -> list[Record]:
    """Read records of `run_speed`."""
    from twigvlm.evaluation.results_log import answered, read_records

    records = answered(read_records(path))
    if "long" not in records[0] or "runs" not in records[0]:
        raise TwigVLMError(f"results {str(path)!r}: no times; give those of evaluate speed or compare")
    return records


def _speeds(records: Sequence[Record], names: Sequence[str]) -> list[Speed]:
    """Speeds of systems relative to the faster of the base's attention implementations."""
    from twigvlm.evaluation.summary import compare_speeds, faster
    from twigvlm.evaluation.systems import HF_GENERATE

    known = list(records[0]["runs"])
    baselines = [name for name in known if name.startswith(HF_GENERATE)] or known[:1]
    chosen = _chosen("system", names, known)
    return compare_speeds(records, faster(records, baselines), dict.fromkeys(chosen))
