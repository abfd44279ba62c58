"""`twigvlm compare`: all pruning methods under the same budgets, accuracy and speed in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from twigvlm.cli.evaluate.accuracy import ask_variants
from twigvlm.cli.evaluate.options import FIGURE, PruningOptions
from twigvlm.config import WITHOUT_TWIG, Speculate
from twigvlm.errors import TwigVLMError

if TYPE_CHECKING:
    from twigvlm.cli.evaluate.bench import Bench
    from twigvlm.evaluation.compare import Combination
    from twigvlm.evaluation.results_log import Record
    from twigvlm.evaluation.run import InputsOf
    from twigvlm.model import TwigVLM

TIMES = "times.jsonl"


@dataclass(frozen=True, kw_only=True)
class Compare(PruningOptions):
    """Compare pruning methods with each other and with the base: accuracy, memory, and speed with each way to draft."""

    name: ClassVar[str] = "compare"

    methods: tuple[str, ...] = ()
    """Methods of `twigvlm methods`; the base takes part in any case. None given: twig, if there is a twig, and all published
    ones but fitprune, which needs a schedule."""
    speculate: tuple[Speculate, ...] = ("none",)
    timed: int = 20
    """How many short and how many long questions are timed, from the start of the file. 0: no times."""
    repeats: int = 1
    """How often each system answers each timed question."""
    baselines: tuple[str, ...] = ("sdpa", "eager")
    """Attention implementations of the base's own `generate`; the faster one is what speeds are relative to."""
    figure: bool = True
    """Draw accuracy over visual tokens and over time (figure.png); needs matplotlib."""

    def run(self) -> None:
        """Ask and time all combinations, and write results.jsonl, times.jsonl, report.md and the figure."""
        from twigvlm.cli.evaluate.bench import machine, open_bench, write_report
        from twigvlm.evaluation.compare import checked_inputs, compare, make_combinations
        from twigvlm.evaluation.compare_report import comparison_sections
        from twigvlm.evaluation.figures import draw_comparison, undrawn
        from twigvlm.evaluation.report import failed_sections
        from twigvlm.evaluation.results_log import answered
        from twigvlm.evaluation.speed import check_attentions
        from twigvlm.evaluation.variants import make_variants

        self._check()
        bench = open_bench(self, needs_twig=self._needs_twig())
        check_attentions(bench.base, self.baselines if self.timed else ())
        model = bench.grow(exits="exit" in self.speculate)
        variants = make_variants(model, self._methods(bench.twig is not None), self.budgets)
        combinations = make_combinations(variants, self.speculate, timed=self.timed > 0)
        inputs_of = checked_inputs(model, variants, bench.questions.items, bench.inputs_of)
        answers = ask_variants(self, "Answers", bench, model, variants, inputs_of)
        times = _time(self, bench, model, combinations, inputs_of) if self.timed else []
        pruning_head = model.twig.pruning_head is not None
        timed = [record for record in times if "failed" not in record]  # none at all leaves the answers' figures
        lines = compare(answered(answers), timed, combinations, self.baselines)
        reason = undrawn(lines[0].quality.values())
        draws = self.figure and reason is None
        sections = comparison_sections(lines, pruning_head, FIGURE if draws else None)
        more = {"seed": self.seed, **({"repeats": self.repeats, **machine()} if self.timed else {})}
        failures = failed_sections(times, "Failed while timed")
        write_report(self, "Comparison", bench, more, [*failures, *sections], answers)
        if self.timed:
            print(f"Times: {self.output / TIMES}")
        if draws:
            draw_comparison(lines, self.output / FIGURE)
            print(f"Figure: {self.output / FIGURE}")
        elif self.figure:
            print(f"Figure: none, because {reason}")

    def _check(self) -> None:
        """Raise the errors that can be found before a model is loaded."""
        from twigvlm.evaluation.figures import figure_class

        for option, least in (("timed", 0), ("repeats", 1)):
            if getattr(self, option) < least:
                raise TwigVLMError(f"{option}={getattr(self, option)}: must be {least} or more")
        for option in ("budgets", "speculate", "baselines"):
            if not getattr(self, option):
                raise TwigVLMError(f"{option}: none given; give at least one, or leave the option out")
        if self.figure:
            figure_class()

    def _needs_twig(self) -> bool:
        from twigvlm.evaluation.methods import parse_method

        prune = any(parse_method(method).needs_twig for method in self.methods if method != "base")
        return prune or any(way not in WITHOUT_TWIG for way in self.speculate)

    def _methods(self, has_twig: bool) -> list[str]:
        """Names of the methods to compare, without the base, which always takes part."""
        from twigvlm.pruning.methods import METHODS

        # FitPrune needs a schedule that belongs to the base.
        published = ["random:0" if method == "random" else method for method in METHODS if method != "fitprune"]
        chosen = self.methods or [*(["twig"] if has_twig else []), *published]
        return [method for method in dict.fromkeys(chosen) if method not in ("base", "none")]


def _time(
    options: Compare, bench: Bench, model: TwigVLM, combinations: Sequence[Combination], inputs_of: InputsOf
) -> list[Record]:
    """Time all systems in turn on the first questions of each length of answers."""
    import dataclasses

    from twigvlm.cli.evaluate.bench import machine, open_log, showing
    from twigvlm.evaluation.compare import combination_systems, timed_questions
    from twigvlm.evaluation.speed import run_speed

    systems = combination_systems(model, combinations, options.baselines, options.seed)
    settings = {"systems": [system.name for system in systems], "seed": options.seed, "repeats": options.repeats}
    methods = [one.variant.method for one in combinations]
    log = open_log(options, {**bench.settings, **settings, **machine()}, methods, TIMES)
    questions = dataclasses.replace(bench.questions, items=timed_questions(bench.questions.items, options.timed))
    with showing("Times", (question.id for question in questions.items), log) as show:
        return run_speed(
            model,
            bench.processor.tokenizer,
            questions,
            systems,
            inputs_of,
            log,
            options.max_new_tokens,
            options.max_description_tokens,
            options.repeats,
            show,
            memory=True,
        )
