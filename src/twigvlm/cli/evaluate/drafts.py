"""`twigvlm evaluate drafts`: speed for several lengths and thresholds of drafts."""

from dataclasses import dataclass
from typing import ClassVar

from twigvlm.cli.evaluate.options import MethodOption, TimingOptions
from twigvlm.cli.evaluate.speed import time_systems
from twigvlm.config import SpeculationConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateDrafts(MethodOption, TimingOptions):
    """Speed for several draft lengths and thresholds, on the validation split."""

    name: ClassVar[str] = "evaluate drafts"

    lengths: tuple[int, ...] = (3, 5, 8)
    """δ to try: lengths of the longest chains, in tokens."""
    thresholds: tuple[float, ...] = (0.3, 0.6, 0.8)
    """θ to try: a chain ends after a token whose probability is below it."""

    def run(self) -> None:
        """Measure, and write results.jsonl and report.md."""
        from twigvlm.evaluation.systems import draft_systems

        self.check("lengths", "thresholds")
        self.check_method()
        for length in self.lengths:
            for threshold in self.thresholds:
                SpeculationConfig("chain", length, threshold)  # for its errors
        systems = draft_systems(self.method, self.retain, self.lengths, self.thresholds)
        time_systems(self, "Drafts", systems, validation="choosing δ and θ")
