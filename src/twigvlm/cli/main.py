"""Entry point: parse, run the chosen subcommand, and turn input errors and interruptions into one line on stderr."""

import errno
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from twigvlm import __version__
from twigvlm.errors import TwigVLMError, one_line

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes after SIGINT and SIGPIPE."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0; 1 from `doctor` where the core does not work; 2 for an input error or a full disk; 130 after Ctrl-C;
        141 when nobody reads the output any more.

    Raises:
        SystemExit: after help (0) and usage errors (2).
    """
    args_of_process = args is None
    args = list(sys.argv[1:] if args is None else args)
    _prepare_streams()
    continuation = "run the command again to start over"
    try:
        if args == ["--version"]:
            print(f"twigvlm {__version__}", flush=True)
            return 0
        # Imported here, so that Ctrl-C ends even the start with one line.
        from twigvlm.cli.commands import COMMANDS, DESCRIPTION
        from twigvlm.cli.doctor import Doctor
        from twigvlm.cli.families import Families
        from twigvlm.cli.methods import Methods
        from twigvlm.cli.output import busy
        from twigvlm.cli.parsing import parse

        command = parse(COMMANDS, DESCRIPTION, args)
        continuation = getattr(command, "continuation", continuation)
        if not isinstance(command, Doctor | Families | Methods):
            with busy("Starting"):
                import twigvlm.model  # torch and transformers take seconds
            if args_of_process:
                twigvlm.alone_in_process()
        code: int = command.run() or 0
        sys.stdout.flush()
        return code
    except TwigVLMError as error:
        print(f"twigvlm: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        start = "\n" if sys.stderr.isatty() else ""  # below the ^C
        print(f"{start}twigvlm: interrupted; {continuation}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_rest()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_rest()
        print(
            f"twigvlm: error: {error.filename or 'output'}: no space left; make room, and {continuation}",
            file=sys.stderr,
        )
        return 2


def _prepare_streams() -> None:
    """Configure stdout and stderr so that printing any character works."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no Greek shows a question mark


def _drop_rest() -> None:
    """Discard output that cannot be written to stdout; otherwise writing it would fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
