"""`twigvlm evaluate exactness`: count prompts whose answers differ although they must not."""

from dataclasses import dataclass
from typing import ClassVar

from twigvlm.cli.evaluate.options import BudgetOptions, MethodOption
from twigvlm.cli.options import Dtype


@dataclass(frozen=True, kw_only=True)
class EvaluateExactness(MethodOption, BudgetOptions):
    """Count the prompts whose answers differ where they must not; best in float32."""

    name: ClassVar[str] = "evaluate exactness"

    dtype: Dtype = "float32"
    """Data type of the weights. auto: as stored in the base's files; in half precision, near ties may flip."""
    checks: tuple[str, ...] = ()
    """What to compare: chain, tree, auto, lookup, exit, "pruned chain", "pruned tree", "pruned auto", "pruned lookup", "no
    pruning", disabled. None given: all."""

    def run(self) -> None:
        """Compare, and write results.jsonl and report.md."""
        from twigvlm.cli.evaluate.bench import open_bench, open_log, showing, write_report
        from twigvlm.config import PruningConfig
        from twigvlm.evaluation.exactness import choose_checks, run_exactness
        from twigvlm.evaluation.report import exactness_sections
        from twigvlm.evaluation.results_log import answered

        checks = choose_checks(self.checks)
        self.check_method()
        bench = open_bench(self)
        PruningConfig(self.retain)  # for its errors
        more = {"retain": self.retain, "method": self.method}
        log = open_log(self, {**bench.settings, **more, "checks": checks}, [self.method])
        questions = bench.questions.items
        with showing("Exactness", (question.id for question in questions), log, passes=2) as show:
            records = run_exactness(
                bench.base,
                bench.grow,
                questions,
                bench.inputs_of,
                log,
                self.retain,
                checks,
                self.max_new_tokens,
                self.max_description_tokens,
                show,
                self.method,
            )
        write_report(self, "Exactness", bench, more, exactness_sections(answered(records)), records)
