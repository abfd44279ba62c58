"""Files that are written whole or not at all, and folders that one run at a time writes to."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from twigvlm.errors import TwigVLMError, one_line

LOCK = ".lock"
"""Name of the file that marks a folder as being written to."""
_PROBE = 1 << 20  # bytes that must fit into a folder before long work begins
_REMEDY = "free space there, or choose another place"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` as the block ends; if the block fails, all stays as it was.

    The file gets the mode that the umask gives any new file, even from a library that writes for its owner alone.

    Raises:
        TwigVLMError: it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        with writing(str(path)):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a name that is too long, say, of which the block has told already
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(name: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Within this context, what the disk refuses is one line.

    Args:
        name: name of what is written.
        remedy: what the user can do about it.

    Raises:
        TwigVLMError: the disk is full, or the place does not exist or is read-only.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed any more
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, RuntimeError):
            if "inline_container.cc" not in str(error):
                raise
            reason = "no space left"  # all that torch.save says of it is where it came to an end
        raise TwigVLMError(f"{name}: cannot be written ({reason}); {remedy}") from error


def read_text(path: Path, name: str) -> str:
    """A text file in UTF-8, without a byte order mark.

    Args:
        path: of the file.
        name: of the file, for messages.

    Raises:
        TwigVLMError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TwigVLMError(f"{name}: cannot be read ({error.strerror}); check the path and its permissions") from None
    except ValueError as error:
        raise TwigVLMError(f"{name}: cannot be read as text ({one_line(error)}); save it as UTF-8") from None


def numbered_lines(path: Path, name: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, each with its number, from 1; arguments and errors as in `read_text`."""
    # Not splitlines: a text may contain what Unicode takes for the end of a line.
    return [(number, line) for number, line in enumerate(read_text(path, name).split("\n"), start=1) if line.strip()]


@contextlib.contextmanager
def reserved(folder: Path, option: str) -> Iterator[None]:
    """Make a folder, see that it can be written to, and keep other runs out of it while the block runs.

    A run that is killed leaves its lock file behind, but not the lock. A folder that was made for nothing is removed.

    Args:
        folder: the folder.
        option: that names it, for messages.

    Raises:
        TwigVLMError: it cannot be written to, or another run writes there.
    """
    name, made = f"{option} {str(folder)!r}", not folder.exists()
    if not made and not folder.is_dir():
        raise TwigVLMError(f"{name}: is a file; name a directory")
    lock = FileLock(folder / LOCK)
    try:
        with writing(name):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise TwigVLMError(
                    f"{name}: another run is writing there; wait until it ends, or choose another directory"
                ) from None
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(_PROBE))
                probe.flush()
                os.fsync(probe.fileno())
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
            lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
