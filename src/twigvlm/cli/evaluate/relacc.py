"""`twigvlm evaluate relacc`: the paper's Table 1 from result files of lmms-eval."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class EvaluateRelAcc:
    """Compare runs of lmms-eval with the base's: accuracy, RelAcc, budget and speed, in the layout of the paper's Table 1."""

    base: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
    """The run without pruning: a result file of lmms-eval, or the folder that was its --output_path."""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN …", help_behavior_hint="")]
    """Runs to compare, one or more."""
    tasks: tuple[str, ...] = ()
    """Tasks to compare. None given: all of the base's."""

    @property
    def continuation(self) -> str:
        """What to do after Ctrl-C."""
        return "run the same command again"

    def run(self) -> None:
        """Print the table, in markdown."""
        from twigvlm.errors import TwigVLMError
        from twigvlm.evaluation.relacc import LEGEND, read_run, relacc_table

        if not self.runs:
            raise TwigVLMError("runs: none given; name at least one besides the base's")
        table = relacc_table(read_run(self.base), [read_run(path) for path in self.runs], self.tasks)
        print(f"{LEGEND}\n\n{table}")
