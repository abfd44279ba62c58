"""Options shared by several evaluations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from twigvlm.cli.options import ModelOptions
from twigvlm.errors import TwigVLMError

RAW, REPORT, FIGURE = "results.jsonl", "report.md", "figure.png"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Options of every evaluation."""

    name: ClassVar[str]
    """Name of the command, for example `evaluate speed`."""

    questions: Path
    """JSON file of questions with answers; image paths in it are relative to it."""
    output: Path
    """Directory for raw results (JSON lines) and the report (Markdown). The same command again continues a stopped run."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation of base and twig. auto: the base's default."""
    kinds: tuple[str, ...] = ()
    """Kinds of questions to ask. None given: all."""
    limit: int | None = None
    """Ask only the first questions, this many. None: no limit."""
    max_new_tokens: int = 16
    """Longest short answer, in tokens."""
    max_description_tokens: int = 192
    """Longest description, in tokens."""

    @property
    def continuation(self) -> str:
        """How to continue after Ctrl-C, for the message."""
        return f"run the same command again to continue; results in {str(self.output / RAW)!r} are not measured again"


@dataclass(frozen=True, kw_only=True)
class PruningOptions(EvaluateOptions):
    """Options of evaluations of accuracy, under several budgets."""

    budgets: Annotated[tuple[float, ...], arg(aliases=("--retain",))] = (192, 128, 64)
    """R̄, one or more: average numbers of visual tokens over all base layers (Eq. 6), the budgets that papers quote."""
    seed: int = 0
    """Seed of the ranking `random`."""
    figure: bool = False
    """Also plot accuracy over budget (figure.png); needs matplotlib."""


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(EvaluateOptions):
    """Options of evaluations under one budget."""

    retain: Annotated[float, arg(aliases=("--budgets",))] = 64


@dataclass(frozen=True, kw_only=True)
class MethodOption:
    """Option of evaluations of one pruning method."""

    method: str = "twig"
    """How to choose the visual tokens: a method of `twigvlm methods`, for example twig, diverse+refocus:0.7 or fastv."""

    def check_method(self) -> None:
        """Raise TwigVLMError, before anything is loaded, if the method does not exist or prunes nothing."""
        from twigvlm.evaluation.methods import parse_method
        from twigvlm.pruning.methods import make_pruner

        ranking = parse_method(self.method).ranking
        if ranking == "published":
            make_pruner(self.method)  # for its errors
        if ranking == "none":
            raise TwigVLMError(f"method={self.method}: prunes nothing; choose one that prunes, such as twig")


@dataclass(frozen=True, kw_only=True)
class TimingOptions(BudgetOptions):
    """Options of evaluations of speed."""

    kinds: tuple[str, ...] = ("description",)
    repeats: int = 3
    """How often each system answers each prompt or batch of prompts, in turn."""

    def check(self, *lists: str) -> None:
        """Raise TwigVLMError if nothing would be measured; `lists` names options that need at least one value."""
        if self.repeats < 1:
            raise TwigVLMError(f"repeats={self.repeats}: must be 1 or more")
        for name in lists:
            if not getattr(self, name):
                raise TwigVLMError(f"{name}: none given; give at least one, or leave the option out")


@dataclass(frozen=True, kw_only=True)
class BaselineOptions(TimingOptions):
    """Options of evaluations of speed relative to the base's own `generate`."""

    baselines: tuple[str, ...] = ("sdpa", "eager")
    """Attention implementations of the base's own `generate`; the faster one is the baseline, for each batch size."""
