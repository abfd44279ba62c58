"""Private names of transformers' Trainer, apart from the others because it takes long to import."""

import os
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments


class StagedTrainer(Trainer):
    """A Trainer whose subclasses decide in which folder a checkpoint is written, and what is done before and after.

    `Trainer._save_checkpoint` and `Trainer._get_output_dir` (transformers 5.23.0).
    """

    _folder = ""

    def write_checkpoint(self, model: nn.Module, write: Callable[[str], None]) -> None:
        """Called at every save.

        Args:
            model: what is trained.
            write: writes `checkpoint-STEP` into this folder of the output directory; "": into the directory itself.
        """
        write("")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        save = super()._save_checkpoint

        def write(folder: str) -> None:
            self._folder = folder
            try:
                save(model, trial)
            finally:
                self._folder = ""

        self.write_checkpoint(model, write)

    def _get_output_dir(self, trial: Any) -> str:
        directory = super()._get_output_dir(trial)
        return os.path.join(directory, self._folder) if self._folder else directory


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Let a process train on one GPU of those that it sees: the Trainer would copy the model to all of them.

    `TrainingArguments._n_gpu` (transformers 5.23.0).
    """
    arguments._n_gpu = min(1, arguments.n_gpu)
