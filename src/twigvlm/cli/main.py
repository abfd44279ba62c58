"""Entry point: parse, run the chosen subcommand, and turn what a user can mend into one line on stderr."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from twigvlm.cli.demo import Demo
from twigvlm.cli.generate import Generate
from twigvlm.cli.train import Train
from twigvlm.errors import TwigVLMError

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)
DESCRIPTION = (
    "Make vision-language models answer faster: prune visual tokens and draft answer tokens with one small twig."
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that a user can mend."""
    try:
        command: Generate | Demo | Train = tyro.cli(
            Command,
            prog="twigvlm",
            description=DESCRIPTION,
            args=args,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
        command.run()
    except TwigVLMError as error:
        print(f"twigvlm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
