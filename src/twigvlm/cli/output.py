"""What the subcommands print and write."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing
from twigvlm.training.distributed.processes import is_main

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def progress() -> Progress:
    """A progress display on stderr that leaves no trace, and shows nothing where stderr is no terminal."""
    console = Console(file=sys.stderr)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and is_main()),
    )


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr while the block runs; nothing where stderr is no terminal."""
    console = Console(file=sys.stderr)
    if not (console.is_terminal and is_main()):
        yield
        return
    with console.status(what):
        yield


def check_picture_path(path: Path) -> None:
    """Refuse a place where a picture cannot be written, before any work is done for it."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise TwigVLMError(
            f"out {str(path)!r}: no picture format; end the name in one of {', '.join(PICTURE_SUFFIXES)}"
        )
    if path.is_dir():
        raise TwigVLMError(f"out {str(path)!r}: is a directory; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise TwigVLMError(f"out {str(path)!r}: no writable directory {str(path.parent)!r}; make it or choose another")


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write the picture whole or not at all."""
    check_picture_path(path)
    with replacing(path) as temporary:
        picture.save(temporary)


def check_directory(path: Path, option: str = "out") -> None:
    """Refuse a place where no directory of files can be written, before any work is done for it."""
    if path.exists() and not path.is_dir():
        raise TwigVLMError(f"{option} {str(path)!r}: is a file; name a directory")
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise TwigVLMError(f"{option} {str(path)!r}: {str(nearest)!r} is no writable directory; choose another")
