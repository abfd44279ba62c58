"""`twigvlm figures`: draw the paper's figures from raw results or from a few questions; a command for each."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitSubcommandPrefixes, subcommand

from twigvlm.cli.figures.asked import FigureAttention, FigureDrafts
from twigvlm.cli.figures.measured import FigureSamples, FigureSpeeds, FigureTimes


@dataclass(frozen=True)
class Figures:
    """Draw the figures of the paper for a twig of your own."""

    what: Annotated[
        Annotated[FigureTimes, subcommand("times")]
        | Annotated[FigureSpeeds, subcommand("speeds")]
        | Annotated[FigureSamples, subcommand("samples")]
        | Annotated[FigureAttention, subcommand("attention")]
        | Annotated[FigureDrafts, subcommand("drafts")],
        OmitSubcommandPrefixes,
    ]

    def run(self) -> None:
        """Draw the chosen figure."""
        self.what.run()
