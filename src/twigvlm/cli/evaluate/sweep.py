"""`twigvlm evaluate sweep`: accuracy for several K_f and φ."""

from dataclasses import dataclass
from typing import ClassVar

from twigvlm.cli.evaluate.accuracy import compare_prunings
from twigvlm.cli.evaluate.options import MethodOption, PruningOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateSweep(MethodOption, PruningOptions):
    """Accuracy of the twig's pruning for several K_f and φ, on the validation split."""

    name: ClassVar[str] = "evaluate sweep"

    final_wipes: tuple[int, ...] = ()
    """K_f to try. None given: every fourth layer, from the last one down to the middle."""
    final_shares: tuple[float, ...] = ()
    """φ to try: the share of the kept visual tokens that stays after layer K_f. None given: the twig's own."""

    def run(self) -> None:
        """Ask, and write results.jsonl, report.md and the figure."""
        from twigvlm.cli.evaluate.bench import open_bench

        self.check_method()
        bench = open_bench(self, validation="choosing K_f and φ")
        layers = bench.body.num_layers
        final_wipes = self.final_wipes or tuple(range(layers, layers // 2, -4))
        compare_prunings(self, "Sweep of K_f and φ", (self.method,), final_wipes, self.final_shares, bench)
