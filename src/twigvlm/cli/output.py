"""Printing, progress and output files of the subcommands."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
INTERVAL = 30.0
"""Seconds between two lines of progress if stderr is not a terminal."""


class Printer(Console):
    """A rich console that leaves a broken pipe to `main`."""

    def on_broken_pipe(self) -> None:
        """Raise the error; rich would end the process with exit code 1."""
        raise BrokenPipeError


def is_main() -> bool:
    """Whether this process prints; of several that train together, only one does."""
    # `processes.is_main` would import torch, which is what one waits for at first.
    return os.environ.get("RANK", "0") == "0"


def progress() -> Progress:
    """A progress display on stderr that disappears at the end, and shows nothing if stderr is not a terminal."""
    console = Printer(file=sys.stderr)
    return Progress(
        SpinnerColumn(),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("·"),
        TimeRemainingColumn(),
        TextColumn("left"),
        # A long description is cut, so that what comes before it fits on a narrow terminal.
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        expand=True,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not (console.is_terminal and is_main()),
    )


@contextlib.contextmanager
def steps(title: str, total: int, done: int = 0, last_line: bool = True) -> Iterator[Callable[..., None]]:
    """Show work of known length on stderr: a bar with the time left or, if stderr is not a terminal, a line now and then.

    Args:
        title: title of the work.
        total: number of its steps.
        done: number of steps that an earlier run has done.
        last_line: if stderr is not a terminal, whether a line is printed at the end even of short work.

    Yields:
        A function `advance(title=None, count=1)` to call after each step, or with `count=0` to change the title only.
    """
    now, start, current = done, time.monotonic(), title

    def line() -> str:
        if now in (done, total):
            return f"{now}/{total} {current}"
        left = (time.monotonic() - start) / (now - done) * (total - now)
        return f"{now}/{total} {current}, {timedelta(seconds=round(left))} left"

    with progress() as bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance(text: str | None = None, count: int = 1) -> None:
            nonlocal now, current
            now, current = now + count, text or current
            bar.update(task, advance=count, description=current)

        with _lines(line) if bar.disable else contextlib.nullcontext():
            yield advance
        if bar.disable and last_line and is_main():
            print(line(), file=sys.stderr)


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Show work of unknown length on stderr: a spinner or, if stderr is not a terminal, a line now and then."""
    console = Printer(file=sys.stderr)
    if console.is_terminal and is_main():
        with console.status(what):
            yield
        return
    start = time.monotonic()
    with _lines(lambda: f"{what}, for {timedelta(seconds=round(time.monotonic() - start))} so far"):
        yield


@contextlib.contextmanager
def _lines(line: Callable[[], str]) -> Iterator[None]:
    """Print a line on stderr every `INTERVAL` seconds while the block runs, in the main process only."""
    if not is_main():
        yield
        return
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(INTERVAL):
            print(line(), file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check_picture_path(path: Path) -> None:
    """Raise TwigVLMError, before any work, if a picture cannot be written to a path."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise TwigVLMError(
            f"out {str(path)!r}: not a picture format; use a name that ends in one of {', '.join(PICTURE_SUFFIXES)}"
        )
    if path.is_dir():
        raise TwigVLMError(f"out {str(path)!r}: is a directory; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise TwigVLMError(
            f"out {str(path)!r}: no writable directory {str(path.parent)!r}; create it or choose another"
        )


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture completely or not at all."""
    check_picture_path(path)
    with replacing(path) as temporary:
        picture.save(temporary)


def check_file(path: Path, name: str, wanted: str) -> None:
    """Raise TwigVLMError if a path to read from does not exist, is a directory, or may not be read.

    Args:
        path: the path.
        name: of the option with its value, for the message.
        wanted: what to give instead, for the message.
    """
    if not path.exists():
        raise TwigVLMError(f"{name}: no such file; give {wanted}")
    if path.is_dir():
        raise TwigVLMError(f"{name}: is a directory; give {wanted}")
    if not os.access(path, os.R_OK):
        raise TwigVLMError(f"{name}: may not be read; check the file's permissions")


def check_directory(path: Path, option: str = "out") -> None:
    """Raise TwigVLMError, before any work, if a path cannot become a directory of files."""
    if path.exists() and not path.is_dir():
        raise TwigVLMError(f"{option} {str(path)!r}: is a file; name a directory")
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise TwigVLMError(f"{option} {str(path)!r}: {str(nearest)!r} is not a writable directory; choose another")
