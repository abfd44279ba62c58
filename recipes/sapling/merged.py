"""Dropped visual tokens that merge into kept ones after layer K, against the twig's plain cut at the same R̄.

python -m recipes.sapling.merged --questions runs/validation/questions.json --output runs/merged
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor

from recipes.sapling.twig import SHAPE
from twigvlm.cli.evaluate.options import RAW
from twigvlm.cli.main import main as command_line
from twigvlm.evaluation.report import percent, span, table
from twigvlm.evaluation.results_log import answered, read_records
from twigvlm.evaluation.summary import accuracies
from twigvlm.pruning.cut import Choice
from twigvlm.pruning.images import nearest
from twigvlm.pruning.methods import METHODS
from twigvlm.pruning.methods.pruning_head import HeadScores
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.select import diverse, unit
from twigvlm.pruning.view import CutView


@dataclass(frozen=True, kw_only=True)
class Merging(TwigPruner):
    """`diverse`, but what is dropped after layer K merges into the kept token whose state is most like its own."""

    share: float
    """Of a merged state, the part that comes from the mean of the dropped ones."""

    def choose(self, view: CutView, keep: Sequence[int]) -> Choice:
        """As the twig chooses; FinalWipe merges nothing."""
        stays, hidden = super().choose(view, keep), view.tokens.hidden
        if view.layer == self.trunk_layers:
            rows = zip(hidden, view.tokens.visual, stays, strict=True)
            hidden = torch.stack([merge(states, visual, kept, self.share) for states, visual, kept in rows])
        return Choice(stays, hidden)


def merge(
    hidden: Float[Tensor, "tokens width"],
    visual: Bool[Tensor, " tokens"],
    stays: Bool[Tensor, " tokens"],
    share: float,
) -> Float[Tensor, "tokens width"]:
    """The states, where each kept visual token takes up the mean of the dropped ones that are nearest to it, by the cosine.

    Args:
        hidden: states of one row.
        visual: True at its visual tokens.
        stays: True at those that are kept.
        share: of a merged state that comes from the dropped ones, 0 to 1.
    """
    kept, dropped = stays.nonzero()[:, 0], (visual & ~stays).nonzero()[:, 0]
    if not len(kept) or not len(dropped):
        return hidden
    directions = unit(hidden)
    _, target = nearest(directions[dropped], directions[kept])
    counts = torch.bincount(target, minlength=len(kept))
    sums = torch.zeros_like(hidden[kept], dtype=torch.float32).index_add_(0, target, hidden[dropped].float())
    means = sums / counts.clamp(min=1)[:, None]
    weight = share * (counts > 0)[:, None]
    merged = (1 - weight) * hidden[kept].float() + weight * means
    return hidden.index_copy(0, kept, merged.to(hidden.dtype))


@dataclass(frozen=True)
class Options:
    questions: Path
    output: Path
    """Directory for raw results; a stopped run goes on there."""
    shares: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Of a merged state, what comes from the dropped ones."""
    retain: float = 64
    """R̄."""


def main(options: Options) -> None:
    names = {f"merged-{share:g}": share for share in options.shares}
    shape = SHAPE.trunk_layers, SHAPE.final_wipe, SHAPE.final_share
    for name, share in names.items():
        cast(dict[str, Any], METHODS)[name] = partial(Merging, HeadScores(), *shape, select=diverse, share=share)
    words = ["--questions", str(options.questions), "--output", str(options.output), "--budgets", f"{options.retain:g}"]
    if code := command_line(["evaluate", "accuracy", *words, "--methods", "diverse", *names]):
        sys.exit(code)
    rows = []
    for one in accuracies(answered(read_records(options.output / RAW))):
        relative = percent(one.relative) + span(one.interval)
        rows.append([one.name, percent(one.exact), relative, *map(percent, (one.recall, one.precision, one.read))])
    print(table(["pruning", "exact, %", "RelAcc, %", "recall, %", "precision, %", "texts, %"], rows))


if __name__ == "__main__":
    main(tyro.cli(Options))
