r"""Budgets fitted to the question, against one budget for all, at the same average R̄.

A fitted budget keeps visual tokens until they hold a share c of the twig's scores, between the least and the largest budget;
c is such that the budgets' average is the fixed one's. The questions are asked under every budget by `twigvlm evaluate accuracy`.

    python -m recipes.sapling.fitted --questions runs/validation/questions.json --output runs/budgets --budgets 40 52 64 80 104
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from twigvlm import sapling
from twigvlm.cli.evaluate.options import RAW
from twigvlm.cli.output import steps
from twigvlm.cli.session import build_inputs
from twigvlm.evaluation.metrics import bootstrap_interval, relative_accuracy
from twigvlm.evaluation.questions import Question, load_questions
from twigvlm.evaluation.report import percent, span, table
from twigvlm.evaluation.results_log import answered, read_records
from twigvlm.evaluation.variants import score_all
from twigvlm.model import TwigVLM


@dataclass(frozen=True)
class Asked:
    """One question under every budget."""

    question: Question
    plain: int
    """1 if the answer without pruning is right."""
    right: tuple[int, ...]
    """The same under each budget, ascending."""
    covered: tuple[float, ...]
    """Share of the scores that each budget keeps."""


def choose(covered: Sequence[Sequence[float]], share: float) -> list[int]:
    """For each question the first budget that covers the share, or the largest."""
    return [next((n for n, one in enumerate(row) if one >= share), len(row) - 1) for row in covered]


def calibrate(covered: Sequence[Sequence[float]], budgets: Sequence[float], average: float) -> float:
    """The largest share at which the chosen budgets' average is no more than `average`."""
    shares = sorted({one for row in covered for one in row})
    fitting = [share for share in shares if np.mean([budgets[n] for n in choose(covered, share)]) <= average]
    return fitting[-1] if fitting else shares[0]


@dataclass(frozen=True)
class Options:
    questions: Path
    output: Path
    """Directory for raw results; a stopped run goes on there."""
    budgets: tuple[float, ...]
    """R̄, the least and the largest of which bound the fitted ones."""


def ask(options: Options) -> None:
    """Ask every question under every budget."""
    command = [sys.executable, "-m", "twigvlm", "evaluate", "accuracy", "--methods", "twig"]
    command += ["--questions", str(options.questions), "--output", str(options.output)]
    command += ["--budgets", *(f"{budget:g}" for budget in options.budgets)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read(options: Options) -> tuple[list[float], list[Asked]]:
    """The budgets, and what was answered under each."""
    base, processor = sapling.load()
    model = TwigVLM.from_pretrained(base, sapling.twig_path())
    questions = {one.id: one for one in load_questions(options.questions).items if one.objects is None}
    records = [record for record in answered(read_records(options.output / RAW)) if record["id"] in questions]
    names = sorted((name for name in records[0]["score"] if name != "none"), key=_budget)
    asked = []
    with torch.inference_mode(), steps("Scoring", len(records)) as advance:
        for record in records:
            question = questions[record["id"]]
            inputs = build_inputs(base, processor, [question.image], [question.prompt])
            scores = score_all(model, inputs, ["twig"])["twig"][0][model.base.visual_mask(inputs["input_ids"])[0]]
            mass = (scores / scores.sum()).sort(descending=True).values.cumsum(0)
            covered = tuple(float(mass[record["kept"][name] - 1]) for name in names)
            right = tuple(record["score"][name] for name in names)
            asked.append(Asked(question, record["score"]["none"], right, covered))
            advance()
    return [_budget(name) for name in names], asked


def _budget(name: str) -> float:
    return float(name.split("@")[1].split("/")[0])


def main(options: Options) -> None:
    ask(options)
    budgets, asked = read(options)
    covered, plain = [one.covered for one in asked], [one.plain for one in asked]
    pictures = [one.question.image for one in asked]
    rows = []
    for fixed in range(1, len(budgets) - 1):
        # Calibrated on one half of the questions, used on the other.
        chosen = [0] * len(asked)
        for half in (0, 1):
            share = calibrate(covered[1 - half :: 2], budgets, budgets[fixed])
            chosen[half::2] = choose(covered[half::2], share)
        fitted = [one.right[n] for one, n in zip(asked, chosen, strict=True)]
        cells = [f"{budgets[fixed]:g}", f"{np.mean([budgets[n] for n in chosen]):.1f}"]
        for scores in ([one.right[fixed] for one in asked], fitted):
            interval = bootstrap_interval(relative_accuracy, scores, plain, groups=pictures)
            cells.append(percent(relative_accuracy(scores, plain)) + span(interval))
        rows.append(cells)
    print(table(["R̄", "average of the fitted", "RelAcc, fixed", "RelAcc, fitted"], rows))


if __name__ == "__main__":
    main(tyro.cli(Options))
