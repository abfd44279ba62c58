"""`twigvlm evaluate`: measure accuracy, speed, memory and exactness; writes raw results and a report. A file per subcommand."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitSubcommandPrefixes, subcommand

from twigvlm.cli.evaluate.accuracy import EvaluateAccuracy
from twigvlm.cli.evaluate.batches import EvaluateBatches
from twigvlm.cli.evaluate.drafts import EvaluateDrafts
from twigvlm.cli.evaluate.exactness import EvaluateExactness
from twigvlm.cli.evaluate.relacc import EvaluateRelAcc
from twigvlm.cli.evaluate.speed import EvaluateSpeed
from twigvlm.cli.evaluate.sweep import EvaluateSweep


@dataclass(frozen=True)
class Evaluate:
    """Measure accuracy, speed and exactness of a twig on questions with answers."""

    what: Annotated[
        Annotated[EvaluateAccuracy, subcommand("accuracy")]
        | Annotated[EvaluateSweep, subcommand("sweep")]
        | Annotated[EvaluateSpeed, subcommand("speed")]
        | Annotated[EvaluateDrafts, subcommand("drafts")]
        | Annotated[EvaluateBatches, subcommand("batches")]
        | Annotated[EvaluateExactness, subcommand("exactness")]
        | Annotated[EvaluateRelAcc, subcommand("relacc")],
        OmitSubcommandPrefixes,
    ]

    @property
    def continuation(self) -> str:
        """How to continue after Ctrl-C, for the message."""
        return self.what.continuation

    def run(self) -> None:
        """Run the chosen evaluation."""
        self.what.run()
