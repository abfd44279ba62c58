"""`twigvlm evaluate batches`: speed and peak memory of batches."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from twigvlm.cli.evaluate.options import BaselineOptions, MethodOption


@dataclass(frozen=True, kw_only=True)
class EvaluateBatches(MethodOption, BaselineOptions):
    """Tokens per second and peak memory of batches of several sizes."""

    name: ClassVar[str] = "evaluate batches"

    sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Batch sizes to measure; each must divide the number of prompts."""

    def run(self) -> None:
        """Measure, and write results.jsonl and report.md."""
        from twigvlm.cli.evaluate.bench import machine, open_bench, open_log, showing, write_report
        from twigvlm.evaluation.batches import batch_systems, run_batches, split
        from twigvlm.evaluation.methods import parse_methods
        from twigvlm.evaluation.report import batch_sections
        from twigvlm.evaluation.results_log import answered
        from twigvlm.evaluation.speed import check_attentions

        self.check("baselines", "sizes")
        self.check_method()
        bench = open_bench(self)
        check_attentions(bench.base, self.baselines)
        questions, sizes = bench.questions.items, tuple(dict.fromkeys(self.sizes))
        ids = [f"{size}-{number}" for size in sizes for number in range(len(split(questions, size)))]
        systems = batch_systems(self.method, self.retain, self.baselines)
        described = [dataclasses.asdict(system) for system in systems]
        # Batches have no names of their own: which prompts they hold follows from the kinds.
        more = {"repeats": self.repeats, **machine(), "kinds": self.kinds}
        log = open_log(self, {**bench.settings, **more, "systems": described}, [self.method])
        model = bench.grow()
        parse_methods(model, [self.method])  # for its errors
        with showing("Batches", ids, log) as show:
            records = run_batches(
                model,
                bench.processor.tokenizer,
                bench.questions,
                sizes,
                systems,
                bench.inputs_of,
                log,
                self.max_new_tokens,
                self.max_description_tokens,
                self.repeats,
                show,
            )
        write_report(self, "Batches", bench, more, batch_sections(answered(records), systems), records)
