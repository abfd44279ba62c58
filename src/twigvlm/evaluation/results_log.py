"""Raw results as JSON lines: the settings on the first line, then one record per question. A stopped run can be continued.

A question that could not be asked, for example because its picture is broken or its prompt cannot have a budget, has a record
too, with the reason as `failed` instead of results. When the run is started again, it is asked again. If a question has several
records, the last one counts.
"""

import json
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twigvlm.errors import TwigVLMError

Record = dict[str, Any]
"""Raw results of one question, or the reason why it failed; always has an `id`."""


def answered(records: Iterable[Record]) -> list[Record]:
    """The records of questions that did not fail.

    Raises:
        TwigVLMError: all of them failed.
    """
    records = list(records)
    found = [record for record in records if "failed" not in record]
    if records and not found:
        raise TwigVLMError(f"every question failed; {records[-1]['failed']}")
    return found


def read_records(path: Path) -> list[Record]:
    """Read the records of a finished or stopped run, the last one of each question.

    Raises:
        TwigVLMError: there is no such file, or it holds no results.
    """
    try:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a stopped run may end within a character
        rows = whole.decode("utf-8").split("\n")[:-1]
        records = {str(record["id"]): record for record in map(json.loads, rows[1:])}
    except OSError as error:
        raise TwigVLMError(f"results {str(path)!r}: {error.strerror}; give a file of raw results") from None
    except (ValueError, KeyError, TypeError):
        records = {}
    if not records:
        raise TwigVLMError(f"results {str(path)!r}: holds no raw results; give a results.jsonl or times.jsonl")
    return list(records.values())


class ResultsLog:
    """A file to which records are appended, and from which a continued run reads them.

    While the object exists, no other process can open the file as a `ResultsLog`: two runs would measure the same questions, and
    disturb each other's times. Windows and file systems without locks do not prevent it.

    Args:
        path: the file, which is created if it does not exist.
        settings: settings that the results depend on, JSON-able.

    Raises:
        TwigVLMError: the file holds results of other settings, or no results at all, cannot be opened, or is in use by another
            process. Settings without any record are replaced.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.records: dict[str, Record] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # It is opened once: by closing another descriptor of the file, the process would lose its lock.
            self._file = path.open("a+b", buffering=0)
            weakref.finalize(self, self._file.close)
            self._lock()
            self._read()
        except OSError as error:
            raise TwigVLMError(f"{path}: {error.strerror}; choose another output directory") from None

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # on Windows
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise TwigVLMError(
                f"{self.path}: another run is writing there; wait until it ends, or choose another output directory"
            ) from None
        except OSError:  # the file system has no locks
            pass

    def _read(self) -> None:
        self._file.seek(0)
        data, head = self._file.readall(), {"settings": self.settings}
        complete = data.rfind(b"\n") + 1
        if complete:
            self._load(data[:complete])
        elif not _line(head).startswith(data):
            raise self._foreign()
        # A run that was stopped while it wrote leaves a part of a line; one that ended before any result may have had other
        # settings.
        self._file.truncate(complete if self.records else 0)
        if not self.records:
            self._write(head)

    def _load(self, data: bytes) -> None:
        try:
            head, *rows = data.decode("utf-8").split("\n")[:-1]
            settings = json.loads(head)["settings"]
            self.records = {str(record["id"]): record for record in map(json.loads, rows)}
        except (ValueError, KeyError, TypeError):
            raise self._foreign() from None
        if settings != self.settings and self.records:
            names = sorted(settings.keys() | self.settings.keys())
            other = [name for name in names if settings.get(name) != self.settings.get(name)]
            raise TwigVLMError(
                f"{self.path}: holds results of other settings ({', '.join(other)}); choose another output directory"
            )

    def results(self, identity: str) -> Record | None:
        """The record of a question; None if it has not been asked, or failed."""
        record = self.records.get(identity)
        return None if record is None or "failed" in record else record

    def append(self, record: Record) -> Record:
        """Append a record, which is on disk when this returns. Returns it in the form in which it will be read again."""
        stored: Record = json.loads(json.dumps(record))
        if self.records.get(str(record["id"])) != stored:  # a question may fail again, for the same reason
            self._write(record)
            self.records[str(record["id"])] = stored
        return stored

    def _write(self, line: Mapping[str, Any]) -> None:
        with open(self._file.fileno(), "ab", closefd=False) as file:
            file.write(_line(line))
            file.flush()
            os.fsync(file.fileno())

    def _foreign(self) -> TwigVLMError:
        return TwigVLMError(f"{self.path}: not a file of results; choose another output directory")


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
