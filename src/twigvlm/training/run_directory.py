"""The directory of a training: its settings and its checkpoints, which are whole or not there."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from twigvlm.errors import TwigVLMError, one_line
from twigvlm.files import replacing
from twigvlm.training.distributed import processes

UNFINISHED = "unfinished"
"""Folder in which a checkpoint is written before it is moved to where it is looked for."""
SIZES = "sizes.json"
"""File of a checkpoint with the bytes of each of its other files, by which a damaged copy is told."""
KEPT = 2
"""Checkpoints that are kept, the latest ones."""
FREE = ("workers", "log_steps", "save_steps", "tensorboard", "gradient_checkpointing")
"""Settings that may change when a run goes on, since the twig does not depend on them."""


def check_room(directory: Path, module: nn.Module, saves: int) -> None:
    """Refuse a disk that is too full for the checkpoints of a run: those that are kept, and the one that is being written.

    Args:
        directory: of the checkpoints.
        module: what they hold, in float32, with two more numbers for every weight that is trained.
        saves: checkpoints that the run writes.

    Raises:
        TwigVLMError: names the space in GB (10⁹ bytes) that is free and that is needed.
    """
    parameters = list(module.parameters())
    size = 4 * sum(parameter.numel() * (3 if parameter.requires_grad else 1) for parameter in parameters)
    needed = size * max(0, min(saves, KEPT + 1) - len(whole(directory)))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise TwigVLMError(
            f"directory {str(directory)!r}: {free / 1e9:.1f} GB are free, and the checkpoints need {needed / 1e9:.1f} GB; free "
            "some space, or choose another directory"
        )


def publish(directory: Path, name: str) -> None:
    """Move a finished checkpoint from `UNFINISHED` to where it is looked for, and remove all but the latest ones.

    Args:
        directory: of the checkpoints.
        name: of the checkpoint, "checkpoint-STEP".
    """
    folder, target = directory / UNFINISHED / name, directory / name
    mode = (folder / "trainer_state.json").stat().st_mode
    sizes = {}
    for file in folder.iterdir():
        file.chmod(mode)  # safetensors writes for the owner alone
        sizes[file.name] = file.stat().st_size
    (folder / SIZES).write_text(json.dumps(sizes))
    if target.exists():
        shutil.rmtree(target)
    os.replace(folder, target)
    (directory / UNFINISHED).rmdir()
    for old in whole(directory)[:-KEPT]:
        # If the removal is cut off, the next run clears away what is left there.
        os.replace(old, directory / UNFINISHED)
        shutil.rmtree(directory / UNFINISHED)


def whole(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the latest last. Copies under other names are the user's, and none."""
    found = [file.parent for file in directory.glob("checkpoint-*/trainer_state.json")]
    return sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)), key=_step)


def latest(directory: Path) -> Path | None:
    """The latest checkpoint in a directory; None: there is none."""
    return next(reversed(whole(directory)), None)


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint that lacks a file or holds one of another size, as a copy that was cut off does.

    Raises:
        TwigVLMError: names the file.
    """
    sizes = _read_json(checkpoint / SIZES) if (checkpoint / SIZES).exists() else {}  # older checkpoints have none
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise TwigVLMError(
                f"{file}: is missing or was cut off; copy the checkpoint again, or delete its folder to go on from the one "
                "before"
            )


def check_settings(directory: Path, settings: dict[str, Any], checkpoint: Path | None) -> None:
    """Keep the settings beside the checkpoints; a run goes on only with the ones it began with, as far as it knew them.

    Args:
        directory: of the checkpoints.
        settings: all that the result depends on, by name, and the settings in `FREE`.
        checkpoint: the one to go on from; None: the run begins.

    Raises:
        TwigVLMError: a setting has another value than the run began with.
    """
    file = directory / "settings.json"
    text = json.dumps(settings, indent=1) + "\n"
    if checkpoint is not None and file.is_file():
        before = _read_json(file)
        for name, value in json.loads(text).items():
            if name not in FREE and before.get(name, value) != value:
                raise TwigVLMError(
                    f"{name}={value}: the checkpoint in {str(directory)!r} was trained with {before[name]}; "
                    "resume with the same settings or choose another directory"
                )
    elif processes.is_main():
        with replacing(file) as temporary:
            temporary.write_text(text)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise TwigVLMError(
            f"{file}: cannot be read ({one_line(error)}); copy it again, or start over in another directory"
        ) from None
    return found
