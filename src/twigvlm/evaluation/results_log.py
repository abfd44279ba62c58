"""Raw results as JSON lines: a first line with the settings, then one record per question. A stopped run continues."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twigvlm.errors import TwigVLMError

Record = dict[str, Any]
"""One question's raw results; has an `id`."""


class ResultsLog:
    """A file of records that is appended to, and read again when the run goes on.

    Args:
        path: the file; made if there is none.
        settings: what the results depend on, JSON-able.

    Raises:
        TwigVLMError: the file holds results of other settings, or something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.records: dict[str, Record] = {}
        head = {"settings": self.settings}
        try:
            data = path.read_bytes() if path.exists() else b""
            complete = data.rfind(b"\n") + 1
            if complete:
                self._load(data[:complete])
                if complete < len(data):  # a run was stopped while it wrote
                    os.truncate(path, complete)
            elif _line(head).startswith(data):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._write("wb", head)
            else:
                raise self._foreign()
        except OSError as error:
            raise TwigVLMError(f"{path}: {error.strerror}; choose another output directory") from None

    def _load(self, data: bytes) -> None:
        try:
            head, *rows = data.decode("utf-8").split("\n")[:-1]
            settings = json.loads(head)["settings"]
            self.records = {str(record["id"]): record for record in map(json.loads, rows)}
        except (ValueError, KeyError, TypeError):
            raise self._foreign() from None
        if settings != self.settings:
            names = sorted(settings.keys() | self.settings.keys())
            other = [name for name in names if settings.get(name) != self.settings.get(name)]
            raise TwigVLMError(
                f"{self.path}: holds results of other settings ({', '.join(other)}); choose another output directory"
            )

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        self._write("ab", record)
        self.records[str(record["id"])] = json.loads(json.dumps(record))

    def _write(self, mode: str, line: Mapping[str, Any]) -> None:
        with self.path.open(mode) as file:
            file.write(_line(line))
            file.flush()
            os.fsync(file.fileno())

    def _foreign(self) -> TwigVLMError:
        return TwigVLMError(f"{self.path}: not a file of results; choose another output directory")


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
