"""Raw results as JSON lines: a first line with the settings, then one record per question. A stopped run continues."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twigvlm.errors import TwigVLMError

Record = dict[str, Any]
"""One question's raw results; has an `id`."""


class Journal:
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
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete:
            self._load(complete)
            if complete != text:  # a run was stopped while it wrote
                path.write_text(complete, encoding="utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write("w", {"settings": self.settings})

    def _load(self, text: str) -> None:
        head, *rows = text.split("\n")[:-1]
        try:
            settings = json.loads(head)["settings"]
            self.records = {str(record["id"]): record for record in map(json.loads, rows)}
        except (ValueError, KeyError, TypeError):
            raise TwigVLMError(f"{self.path}: not a file of results; choose another output directory") from None
        if settings != self.settings:
            names = sorted(settings.keys() | self.settings.keys())
            other = [name for name in names if settings.get(name) != self.settings.get(name)]
            raise TwigVLMError(
                f"{self.path}: holds results of other settings ({', '.join(other)}); choose another output directory"
            )

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        self._write("a", record)
        self.records[str(record["id"])] = json.loads(json.dumps(record))

    def _write(self, mode: str, line: Mapping[str, Any]) -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
