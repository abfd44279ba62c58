"""A question of lmms-eval as this library's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twigvlm.errors import TwigVLMError

_PICTURE = "<image>"
"""What tasks write into a text where a picture belongs, whatever placeholder the base has."""


def to_messages(given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as `build_inputs` takes them; lmms-eval names pictures and videos by `url`.

    Args:
        given: messages that a task's `doc_to_messages` returns.

    Raises:
        TwigVLMError: a part is neither text nor a picture or a video.
    """
    return [{"role": message["role"], "content": _parts(message["content"])} for message in given]


def _parts(content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pictures stand where the texts mark them, if there is a mark for each; marks themselves are left out."""
    parts = [_part(given) for given in content]
    pictures = [part for part in parts if part["type"] == "image"]
    pieces = [part["text"].split(_PICTURE) if part["type"] == "text" else [] for part in parts]
    if sum(len(piece) - 1 for piece in pieces if piece) != len(pictures):
        return [
            {"type": "text", "text": "".join(piece)} if piece else part
            for part, piece in zip(parts, pieces, strict=True)
        ]
    found: list[dict[str, Any]] = []
    for part, piece in zip(parts, pieces, strict=True):
        for index, text in enumerate(piece):
            if index:
                found.append(pictures.pop(0))
            if text or len(piece) == 1:
                found.append({"type": "text", "text": text})
        if part["type"] == "video":
            found.append(part)
    return found


def _part(given: dict[str, Any]) -> dict[str, Any]:
    if given["type"] == "text":
        return {"type": "text", "text": given["text"]}
    if given["type"] not in ("image", "video") or isinstance(given["url"], dict):
        raise TwigVLMError(f"a part of type {given['type']!r}: is not supported; choose a task of images or videos")
    return {"type": given["type"], given["type"]: given["url"]}
