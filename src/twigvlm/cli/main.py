"""Entry point: parse, run the chosen subcommand, and turn what a user can mend into one line on stderr."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from twigvlm.cli.convert import Convert
from twigvlm.cli.demo import Demo
from twigvlm.cli.evaluate import Evaluate
from twigvlm.cli.families import Families
from twigvlm.cli.generate import Generate
from twigvlm.cli.inspect import Inspect
from twigvlm.cli.train import Train
from twigvlm.errors import TwigVLMError, one_line

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Families, tyro.conf.subcommand("families")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
)
DESCRIPTION = (
    "Make vision-language models answer faster: prune visual tokens and draft answer tokens with one small twig."
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that a user can mend."""
    try:
        _parse(args).run()
    except TwigVLMError as error:
        print(f"twigvlm: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parse(args: Sequence[str] | None) -> Generate | Demo | Inspect | Train | Evaluate | Families | Convert:
    """Options from the command line; exits with 2 on a usage error, and raises the TwigVLMError of a bad value.

    tyro shows the ValueErrors of nested dataclasses in a box of its own; what it prints is held back until it is known
    which of the two it was.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            command: Generate | Demo | Inspect | Train | Evaluate | Families | Convert = tyro.cli(
                Command,
                prog="twigvlm",
                description=DESCRIPTION,
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
            return command
    except SystemExit as stop:
        cause = stop.__context__
        while cause is not None and not isinstance(cause, TwigVLMError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(printed.getvalue())
        raise
