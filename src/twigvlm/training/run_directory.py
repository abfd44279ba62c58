"""The directory of a training: its settings and its checkpoints, which are whole or not there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing
from twigvlm.training.distributed import processes

UNFINISHED = "unfinished"
"""Folder in which a checkpoint is written before it is moved to where it is looked for."""
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
    """Move a finished checkpoint to where it is looked for, and remove old ones."""
    mode = (directory / UNFINISHED / name / "trainer_state.json").stat().st_mode
    for file in (directory / UNFINISHED / name).iterdir():
        file.chmod(mode)  # safetensors writes for the owner alone
    shutil.rmtree(directory / name, ignore_errors=True)
    os.replace(directory / UNFINISHED / name, directory / name)
    (directory / UNFINISHED).rmdir()
    for old in whole(directory)[:-KEPT]:
        shutil.rmtree(old)


def whole(directory: Path) -> list[Path]:
    """Checkpoints, the latest last."""
    found = [file.parent for file in directory.glob("checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def latest(directory: Path) -> Path | None:
    return next(reversed(whole(directory)), None)


def check_settings(directory: Path, settings: dict[str, Any], checkpoint: Path | None) -> None:
    """Keep the settings beside the checkpoints; a run goes on only with the ones it began with, as far as it knew them."""
    file = directory / "settings.json"
    text = json.dumps(settings, indent=1) + "\n"
    if checkpoint is not None and file.is_file():
        before = json.loads(file.read_text())
        for name, value in json.loads(text).items():
            if name not in FREE and before.get(name, value) != value:
                raise TwigVLMError(
                    f"{name}={value}: the checkpoint in {str(directory)!r} was trained with {before[name]}; "
                    "resume with the same settings or choose another directory"
                )
    elif processes.is_main():
        with replacing(file) as temporary:
            temporary.write_text(text)
