"""`twigvlm evaluate accuracy`: accuracy of several ways to prune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from twigvlm.cli.evaluate.options import FIGURE, PruningOptions

if TYPE_CHECKING:
    from twigvlm.cli.evaluate.bench import Bench
    from twigvlm.evaluation.results_log import Record
    from twigvlm.evaluation.run import InputsOf
    from twigvlm.evaluation.variants import Variant
    from twigvlm.model import TwigVLM


@dataclass(frozen=True, kw_only=True)
class EvaluateAccuracy(PruningOptions):
    """Accuracy of several ways to prune under the same budgets."""

    name: ClassVar[str] = "evaluate accuracy"

    methods: tuple[str, ...] = ("twig", "random", "fastv")
    """How to choose the visual tokens: methods of `twigvlm methods`, for example twig, diverse+refocus:0.7, deep:15-24 or fastv.
    The base takes part in any case."""
    final_wipe: int | None = None
    final_share: float | None = None

    def run(self) -> None:
        """Ask all questions, and write results.jsonl, report.md and the figure."""
        final_wipes = () if self.final_wipe is None else (self.final_wipe,)
        final_shares = () if self.final_share is None else (self.final_share,)
        compare_prunings(self, "Accuracy", self.methods, final_wipes, final_shares)


def compare_prunings(
    options: PruningOptions,
    title: str,
    methods: Sequence[str],
    final_wipes: Sequence[int],
    final_shares: Sequence[float],
    bench: Bench | None = None,
) -> None:
    """Ask every question by every method under every budget, K_f and φ, and write results, report and figure.

    Args:
        options: options of the command.
        title: title of the report.
        methods: names of pruning methods.
        final_wipes: values of K_f; none: the twig's own.
        final_shares: values of φ; none: the twig's own.
        bench: what the options name, if it is loaded already; None: it is loaded here.
    """
    from twigvlm.cli.evaluate.bench import open_bench, write_report
    from twigvlm.evaluation.figures import draw_accuracy, figure_class, undrawn
    from twigvlm.evaluation.methods import parse_method
    from twigvlm.evaluation.report import accuracy_sections
    from twigvlm.evaluation.results_log import answered
    from twigvlm.evaluation.summary import accuracies
    from twigvlm.evaluation.variants import NONE, make_variants

    if options.figure:
        figure_class()  # for its error, before hours of work
    needs_twig = any(parse_method(method).needs_twig for method in methods)
    bench = bench or open_bench(options, needs_twig=needs_twig)
    model = bench.grow()
    variants = make_variants(model, methods, options.budgets, final_wipes, final_shares)
    records = ask_variants(options, title, bench, model, variants, bench.inputs_of)
    figures = accuracies(answered(records))
    write_report(options, title, bench, {"seed": options.seed}, accuracy_sections(figures, variants), records)
    if options.figure:
        reason = undrawn(one for one in figures if one.name == NONE.name)
        if reason is None:
            draw_accuracy(figures, variants, options.output / FIGURE)
            print(f"Figure: {options.output / FIGURE}")
        else:
            print(f"Figure: none, because {reason}")


def ask_variants(
    options: PruningOptions,
    title: str,
    bench: Bench,
    model: TwigVLM,
    variants: Sequence[Variant],
    inputs_of: InputsOf,
) -> list[Record]:
    """Ask every question under every variant, in forks of one request, and show progress.

    Args:
        options: options of the command; the records are written to its output directory.
        title: title of the progress display.
        bench: the loaded base and questions.
        model: the model that answers.
        variants: ways to prune.
        inputs_of: prepares a question.
    """
    from twigvlm.cli.evaluate.bench import open_log, showing
    from twigvlm.evaluation.accuracy import run_accuracy
    from twigvlm.evaluation.progress import Progress

    settings = {**bench.settings, "variants": [variant.name for variant in variants], "seed": options.seed}
    log = open_log(options, settings, [variant.method for variant in variants])
    ids = [question.id for question in bench.questions.items]
    with showing(title, ids, log, accuracies=Progress()) as show:
        return run_accuracy(
            model,
            bench.processor.tokenizer,
            bench.questions,
            variants,
            inputs_of,
            log,
            options.max_new_tokens,
            options.max_description_tokens,
            options.seed,
            show,
        )
