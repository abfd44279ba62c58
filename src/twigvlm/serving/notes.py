"""A file beside results that notes their settings: a run can only be continued with the same settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twigvlm.checkpoints.hub import is_hub_id
from twigvlm.checkpoints.twig_files import WEIGHTS, digest
from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing


def check_note(note: Path, settings: Mapping[str, Any], begun: bool, name: str, kind: str) -> None:
    """Compare the settings with those in the note, or write the note if there are no results yet.

    Args:
        note: path of the note.
        settings: the settings, JSON-able.
        begun: whether there are results already.
        name: name of the results in error messages.
        kind: what errors tell the user to choose another one of: "file" or "directory".

    Raises:
        TwigVLMError: there are results with other settings, or without a note that can be read.
    """
    wanted = json.loads(json.dumps(settings))
    if not begun:
        with replacing(note) as temporary:
            temporary.write_text(json.dumps(wanted), encoding="utf-8")
        return
    try:
        found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        damaged = not isinstance(found, dict)
    except (OSError, ValueError):
        damaged = True
    if damaged:
        raise TwigVLMError(f"{name}: its settings, {str(note)!r}, cannot be read; name another {kind}")
    other = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if other:
        raise TwigVLMError(f"{name}: holds answers with other options ({', '.join(other)}); name another {kind}")


def noted_twig(twig: str | None) -> str | None:
    """How a note names a twig: by a digest of a directory's files, which training may change, or by its hub id."""
    if twig is None or is_hub_id(twig) or not (Path(twig) / WEIGHTS).is_file():
        return twig
    return digest(Path(twig))
