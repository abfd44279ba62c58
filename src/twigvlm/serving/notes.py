"""A note beside results, of the settings that they depend on: a run that goes on must have the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twigvlm.checkpoints.hub import is_hub_id
from twigvlm.checkpoints.twig_files import WEIGHTS, digest
from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing


def check_note(note: Path, settings: Mapping[str, Any], begun: bool, name: str, kind: str) -> None:
    """Compare the settings with those of the note, or write it where there is no result yet.

    Args:
        note: the file.
        settings: JSON-able.
        begun: whether there are results.
        name: of what holds the results, for messages.
        kind: of what else could hold the others, for messages: "file" or "directory".

    Raises:
        TwigVLMError: there are results with other settings, or with unknown ones.
    """
    wanted = json.loads(json.dumps(settings))
    if not begun:
        with replacing(note) as temporary:
            temporary.write_text(json.dumps(wanted), encoding="utf-8")
        return
    found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    other = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if other:
        raise TwigVLMError(f"{name}: holds answers with other options ({', '.join(other)}); name another {kind}")


def noted_twig(twig: str | None) -> str | None:
    """How a note names a twig: a directory by its content, which a training may have changed since; a hub id as it is."""
    if twig is None or is_hub_id(twig) or not (Path(twig) / WEIGHTS).is_file():
        return twig
    return digest(Path(twig))
