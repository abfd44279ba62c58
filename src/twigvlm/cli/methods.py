"""`twigvlm methods`: which pruning methods there are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Methods:
    """List the pruning methods that `--pruner` and `compare --methods` accept."""

    def run(self) -> None:
        """Print the table on stdout."""
        from rich.console import Console
        from rich.table import Column, Table

        from twigvlm.pruning.methods import METHODS, described

        table = Table(*(Column(header, overflow="fold") for header in ("method", "cuts", "needs", "paper")))
        table.add_row(
            "twig", "after layer K, and all after layer K_f", "a trained twig", "this method, TwigVLM and TwigVLM++"
        )
        for name in METHODS:
            table.add_row(*described(name))
        Console().print(table)
