"""Read training samples from files, and leave out broken ones."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twigvlm.errors import TwigVLMError, one_line
from twigvlm.files import numbered_lines, read_text
from twigvlm.images import is_uri
from twigvlm.training.data.samples import BrokenSample, Samples, read_sample, to_messages
from twigvlm.training.distributed import processes

SHOWN = 10
"""Broken samples that are named by a line each; further ones are only counted."""

_log = logging.getLogger(__name__)


def load_samples(path: Path, images: Path | None = None, strict: bool = False) -> Samples:
    """Read samples; those that are visibly broken without opening their pictures are reported and left out.

    Args:
        path: a `.json` (a list), `.jsonl` or `.parquet` file, a directory with any of them, or a directory made by
            `datasets.Dataset.save_to_disk`. A file with another suffix is read as `.json`.
        images: folder that image paths are relative to. None: the directory of the samples.
        strict: make the first broken sample an error.

    Returns:
        The good samples in the form of `to_messages`, with absolute image paths; their `digest` changes with their order, ids
        and texts.

    Raises:
        TwigVLMError: names the file, or the sample by its id, with the remedy.
    """
    if images is not None and not images.is_dir():
        raise TwigVLMError(
            f"images {str(images)!r}: no such directory; give the folder that image paths are relative to"
        )
    parts = _read(path)
    folder = (images or (path if path.is_dir() else path.parent)).resolve()
    good: list[tuple[Samples, int]] = []
    broken: list[str] = []
    digest = hashlib.sha256()
    for part in parts:
        for index in range(len(part)):
            try:
                sample = to_messages(*read_sample(part, index), folder)
                _check_files(sample)
                good.append((part, index))
                digest.update(_told(sample))
            except BrokenSample as error:
                if strict:
                    raise
                if processes.is_main():  # all read the same
                    warn_skipped(error, len(broken))
                broken.append(str(error))
    if not good and not broken:
        raise TwigVLMError(f"data {str(path)!r}: holds no samples; give at least one conversation")
    if not good:
        raise TwigVLMError(f"data {str(path)!r}: all {len(broken)} samples are broken; {broken[-1]}")
    if processes.is_main():
        summarise(len(broken), len(broken) + len(good))
    return _Good(good, folder, digest.hexdigest()[:12])


@dataclass(frozen=True)
class _Good:
    """The good samples of what was read; nothing is held twice."""

    found: list[tuple[Samples, int]]
    folder: Path
    digest: str

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return to_messages(*read_sample(*self.found[index]), self.folder)


def warn_skipped(error: BrokenSample, before: int) -> None:
    """One line for a broken sample that is skipped, unless many were reported before.

    Args:
        error: what is wrong with it.
        before: broken samples that were reported before.
    """
    if before < SHOWN:
        _log.warning("skipped %s", error)
    elif before == SHOWN:
        _log.warning("further broken samples are skipped without a line each")


def summarise(broken: int, total: int) -> None:
    """One line that counts broken samples, if there were any.

    Args:
        broken: number of broken samples.
        total: number of all samples.
    """
    if broken:
        _log.warning("skipped %d of %d samples", broken, total)


def _told(sample: Mapping[str, Any]) -> bytes:
    """What a sample is and says; where its pictures lie may change before a run goes on."""
    return json.dumps((sample["id"], sample["messages"]), default=str).encode()


def _check_files(sample: Mapping[str, Any]) -> None:
    for image in sample["images"]:
        if isinstance(image, str) and not is_uri(image) and not os.path.isfile(image):
            raise BrokenSample(
                f"sample {sample['id']!r}: no image file {image!r}; set --images to the folder that image paths start from"
            )


def _read(path: Path) -> list[Samples]:
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in path.iterdir() if each.is_dir())
        raise TwigVLMError(
            f"data {str(path)!r}: holds the splits {', '.join(splits)}; name the directory of one of them"
        )
    if path.is_dir() and (path / "dataset_info.json").is_file():
        return [_table(path)]
    if path.is_dir():
        kinds = (".json", ".jsonl", ".parquet")
        files = sorted(file for file in path.iterdir() if file.suffix in kinds and file.is_file())
        if not files:
            raise TwigVLMError(f"data {str(path)!r}: holds no .json, .jsonl or .parquet file; name the file of samples")
    elif path.is_file():
        files = [path]
    else:
        raise TwigVLMError(f"data {str(path)!r}: no such file or directory; give a .json, .jsonl or .parquet file")
    elsewhere = ", or move the file out of this directory of samples" if path.is_dir() else ""
    return [_table(file) if file.suffix == ".parquet" else _records(file, elsewhere) for file in files]


def _table(path: Path) -> Samples:
    """A Hugging Face dataset, its pictures left as they lie: opened in time, and by the same rules as files."""
    try:
        import datasets
    except ImportError:
        raise TwigVLMError(f"data {str(path)!r}: needs more packages; run: pip install 'twigvlm[train]'") from None
    try:
        table = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # Arrow raises whatever a broken file leads it to
        raise TwigVLMError(
            f"data {str(path)!r}: not readable as a data set ({one_line(error)}); save it again"
        ) from None
    picture = datasets.Image(decode=False)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, picture)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, type(feature)(picture))
    return table


def _records(file: Path, elsewhere: str) -> list[Any]:
    """What a JSON file holds; `elsewhere` ends the remedies of a file that may not belong to the samples."""
    name = f"data {str(file)!r}"
    if file.suffix == ".jsonl":
        return [_parse(line, f"{name}: line {number}", elsewhere) for number, line in numbered_lines(file, name)]
    records = _parse(read_text(file, name), name, elsewhere)
    if not isinstance(records, list):
        kind = type(records).__name__
        raise TwigVLMError(f"{name}: holds one JSON {kind}; put the samples in a list{elsewhere}")
    return records


def _parse(text: str, name: str, elsewhere: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TwigVLMError(
            f"{name}: not readable as JSON ({error}); correct it or export it again{elsewhere}"
        ) from None
