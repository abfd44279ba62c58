"""`twigvlm methods`: list the pruning methods."""

from dataclasses import dataclass

_TWIG, _ANY_TWIG = "a trained twig", "a twig, trained or not"
_CUTS = "after layer K, and again after layer K_f"
OWN = (
    ("twig", _CUTS, _TWIG, "this method, TwigVLM and TwigVLM++"),
    ("diverse", _CUTS, _TWIG, "ours: twig, but the kept tokens also differ from each other"),
    ("scout", "before the decoder", _TWIG, "ours: twig, ranked by a pass ahead of the decoder"),
    ("diverse+scout", "before the decoder", _TWIG, "ours: diverse and scout"),
    ("refocus:τ", _CUTS, _TWIG, "ours: twig, which chooses again while the answer grows"),
    ("diverse+refocus:τ", _CUTS, _TWIG, "ours: diverse and refocus"),
    ("attention", _CUTS, _TWIG, "TwigVLM: the last twig layer's attention from the last token"),
    ("twig-text", _CUTS, _TWIG, "the same from all text tokens"),
    ("random", _CUTS, _ANY_TWIG, "a random choice, which twig must beat"),
    ("deep:N", _CUTS, _ANY_TWIG, "an oracle: attention of base layer N in a full pass"),
    ("deep:N-M", _CUTS, _ANY_TWIG, "the same, mean of layers N to M"),
)
"""Methods with a twig's cuts or ranking: name, where they cut, what they need, and what they do."""


@dataclass(frozen=True)
class Methods:
    """List the pruning methods that `compare --methods` accepts; `--pruner` accepts twig and the published ones."""

    def run(self) -> None:
        """Print the table on stdout."""
        from rich.table import Column, Table

        from twigvlm.cli.output import Printer
        from twigvlm.pruning.methods import METHODS, described

        table = Table(*(Column(header, overflow="fold") for header in ("method", "cuts", "needs", "what it is")))
        for row in OWN:
            table.add_row(*row, end_section=row is OWN[-1])
        for name in METHODS:
            table.add_row(*described(name))
        Printer().print(table)
