"""The prompts of `twigvlm generate`: one from the options, or many from a file."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twigvlm.cli.output import check_file
from twigvlm.errors import TwigVLMError
from twigvlm.files import numbered_lines
from twigvlm.images import is_uri
from twigvlm.inputs import user_turn


@dataclass(frozen=True)
class Prompt:
    """One prompt with its images and videos."""

    text: str
    images: tuple[str, ...] = ()
    """Paths or data URIs."""
    videos: tuple[str, ...] = ()
    """Paths."""

    def question(self) -> dict[str, Any]:
        """The prompt as a message, its images read.

        Raises:
            TwigVLMError: an image cannot be read, or there is no such video.
        """
        for video in self.videos:
            if not os.path.isfile(video):
                raise TwigVLMError(f"video {video!r}: no such file; give the path of an existing video file")
        return user_turn(self.text, self.images, self.videos)


def read_prompts(path: Path, images: Sequence[str] = (), videos: Sequence[str] = ()) -> list[Prompt]:
    """Read the prompts of a file: a .jsonl file has a JSON object on each line, any other file has a prompt on each line.

    An object has `prompt`, and may have `image` and `video`, each a path or a list of paths relative to the file. With neither,
    it uses the images and videos of the options, as plain lines do. Empty lines are skipped.

    Args:
        path: the file.
        images: images of prompts that name none.
        videos: videos of prompts that name none.

    Raises:
        TwigVLMError: the file or a line is not valid; the message names it, what is wrong, and the remedy.
    """
    name = f"prompts {str(path)!r}"
    check_file(path, name, "a text file with one prompt per line, or a .jsonl file")
    read = _from_json if path.suffix == ".jsonl" else _from_text
    prompts = [
        read(line, f"{name}: line {number}", path.parent, tuple(images), tuple(videos))
        for number, line in numbered_lines(path, name)
    ]
    if not prompts:
        raise TwigVLMError(f"{name}: has no prompt; write one on each line")
    return prompts


def _from_text(line: str, name: str, folder: Path, images: tuple[str, ...], videos: tuple[str, ...]) -> Prompt:
    return Prompt(line.strip(), images, videos)


def _from_json(line: str, name: str, folder: Path, images: tuple[str, ...], videos: tuple[str, ...]) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TwigVLMError(f"{name}: not JSON ({error}); write one object per line, or name the file .txt") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise TwigVLMError(f"{name}: has no text in 'prompt'; write an object that has one")
    if "image" not in record and "video" not in record:
        return Prompt(record["prompt"], images, videos)
    return Prompt(
        record["prompt"], *(_paths(record.get(key), f"{name}: {key!r}", folder) for key in ("image", "video"))
    )


def _paths(value: Any, name: str, folder: Path) -> tuple[str, ...]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise TwigVLMError(f"{name} must be a path or a list of paths; correct it")
    return tuple(path if is_uri(path) else os.path.join(folder, path) for path in paths)
