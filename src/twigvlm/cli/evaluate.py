"""`twigvlm evaluate`: accuracy, speed, memory and exactness of a twig, as raw results and a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class Common:
    """What every evaluation needs."""

    questions: Path
    """JSON file of questions with answers; image paths in it are relative to it."""
    output: Path
    """Directory for raw results (JSON lines) and the report (markdown). A stopped run goes on where it was."""
    model: str = "sapling"
    """The base: `sapling` (embedded), a Hugging Face id or a directory."""
    twig: str | None = None
    """Twig that was grown on the base: a directory or a hub id. On Sapling its own twig is the default."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights. auto: as the base's files say; Sapling's is bfloat16, on a CPU without it float32."""
    device: str = "auto"
    """Where to run: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation of the base and the twig. auto: as the base was loaded."""
    kinds: tuple[str, ...] = ()
    """Kinds of questions to ask. None given: all."""
    limit: int | None = None
    """Ask only the first so many of them."""
    max_new_tokens: int = 16
    """Longest short answer, in tokens."""
    max_description_tokens: int = 192
    """Longest description, in tokens."""


@dataclass(frozen=True)
class Accuracy(Common):
    """Accuracy of several ways to prune under the same budgets."""

    budgets: tuple[float, ...] = (192, 128, 64)
    """R̄: average numbers of visual tokens over all layers."""
    methods: tuple[str, ...] = ("twig", "random", "fastv")
    """twig (its P-Head if it has one), attention (last twig layer), twig-text (the same, all text queries), random, fastv
    (base layer K), deep:N (base layer N, an oracle)."""
    final_wipe: int | None = None
    """K_f for every method. None: as the twig was tuned; the base's number of layers: off."""
    seed: int = 0
    """Of the random choice."""
    figure: bool = False
    """Draw accuracy over budget too (figure.png); needs matplotlib."""

    def run(self) -> None:
        """Ask, and write results.jsonl, report.md and the figure."""
        from twigvlm.cli.evaluation import run_pruning

        wipes = () if self.final_wipe is None else (self.final_wipe,)
        run_pruning(self, "Accuracy", self.methods, wipes, self.seed, self.figure)


@dataclass(frozen=True)
class Sweep(Common):
    """Accuracy of the twig's pruning for several K_f under the same budgets, on the validation split."""

    final_wipes: tuple[int, ...] = ()
    """K_f to try. None given: every fourth layer down from the last, in the upper half."""
    budgets: tuple[float, ...] = (192, 128, 64)
    """R̄: average numbers of visual tokens over all layers."""
    method: str = "twig"
    """How to rank: as in `accuracy`."""
    seed: int = 0
    """Of the random choice."""
    figure: bool = False
    """Draw accuracy over budget too (figure.png); needs matplotlib."""

    def run(self) -> None:
        """Ask, and write results.jsonl, report.md and the figure."""
        from twigvlm.cli.evaluation import run_sweep

        run_sweep(self)


@dataclass(frozen=True)
class Speed(Common):
    """Tokens per second against the base's own `generate` and against parts of the twig."""

    kinds: tuple[str, ...] = ("description",)
    """Kinds of questions to ask."""
    retain: float = 64
    """R̄ of the pruned contenders."""
    draft_length: int = 5
    """δ: most tokens of a chain."""
    draft_threshold: float = 0.6
    """θ: a chain ends after a token whose probability is below this."""
    tree_depth: int = 4
    """D: most tokens on a path of a tree."""
    tree_width: int = 10
    """E: children of each node that is expanded."""
    tree_expand: int = 10
    """K_sel: nodes of a level that are expanded, the most probable ones."""
    tree_nodes: int = 60
    """N_max: most drafted tokens of a tree that are verified."""
    baselines: tuple[str, ...] = ("sdpa", "eager")
    """Attention implementations of the base's own `generate`; the faster one is the baseline."""
    contenders: tuple[str, ...] = ()
    """What to time beside them: "own loop", pruning, chain, tree, auto, "pruning + chain", "pruning + tree", "pruning +
    auto". None given: all."""
    repeats: int = 3
    """Times that every prompt is answered by everyone, alternating."""

    def run(self) -> None:
        """Measure, and write results.jsonl and report.md."""
        from twigvlm.cli.evaluation import run_speeds

        run_speeds(self)


@dataclass(frozen=True)
class Drafts(Common):
    """Speed for several draft lengths δ and thresholds θ, on the validation split; the output does not depend on them."""

    kinds: tuple[str, ...] = ("description",)
    """Kinds of questions to ask."""
    retain: float = 64
    """R̄."""
    lengths: tuple[int, ...] = (3, 5, 8)
    """δ to try."""
    thresholds: tuple[float, ...] = (0.3, 0.6, 0.8)
    """θ to try."""
    repeats: int = 3
    """Times that every prompt is answered by everyone, alternating."""

    def run(self) -> None:
        """Measure, and write results.jsonl and report.md."""
        from twigvlm.cli.evaluation import run_drafts

        run_drafts(self)


@dataclass(frozen=True)
class Batches(Common):
    """Tokens per second and peak memory of batches of several sizes, against the base's own `generate`."""

    kinds: tuple[str, ...] = ("description",)
    """Kinds of questions to ask."""
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Prompts in a batch; each must divide the number of prompts."""
    retain: float = 64
    """R̄ of the pruned contenders."""
    baselines: tuple[str, ...] = ("sdpa", "eager")
    """Attention implementations of the base's own `generate`; at each size the faster one is the baseline."""
    repeats: int = 3
    """Times that every batch is answered by everyone, alternating."""

    def run(self) -> None:
        """Measure, and write results.jsonl and report.md."""
        from twigvlm.cli.evaluation import run_sizes

        run_sizes(self)


@dataclass(frozen=True)
class Exactness(Common):
    """Count the prompts where speculation, no pruning, or a disabled twig changes the answer; best in float32."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights: in half precision, ties may flip."""
    retain: float = 64
    """R̄ of the pruned checks."""
    checks: tuple[str, ...] = ()
    """What to compare: chain, tree, auto, "pruned chain", "pruned tree", "pruned auto", "no pruning", disabled. None given:
    all."""

    def run(self) -> None:
        """Compare, and write results.jsonl and report.md."""
        from twigvlm.cli.evaluation import run_checks

        run_checks(self)


@dataclass(frozen=True)
class Evaluate:
    """Measure accuracy, speed and exactness of a twig on questions with known answers."""

    what: Annotated[
        Annotated[Accuracy, tyro.conf.subcommand("accuracy")]
        | Annotated[Sweep, tyro.conf.subcommand("sweep")]
        | Annotated[Speed, tyro.conf.subcommand("speed")]
        | Annotated[Drafts, tyro.conf.subcommand("drafts")]
        | Annotated[Batches, tyro.conf.subcommand("batches")]
        | Annotated[Exactness, tyro.conf.subcommand("exactness")],
        tyro.conf.OmitSubcommandPrefixes,
    ]

    def run(self) -> None:
        """Run the chosen evaluation."""
        command: Any = self.what
        command.run()
