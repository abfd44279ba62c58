"""Hugging Face's Trainer as both stages use it: their terms in its log, and checkpoints that are whole or not there."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from twigvlm.compat.trainer import StagedTrainer
from twigvlm.errors import TwigVLMError
from twigvlm.files import writing
from twigvlm.training.distributed import fsdp, processes
from twigvlm.training.run_directory import UNFINISHED, latest, publish


class AllStepsDone(Exception):
    """A run that is resumed has nothing left to do; its weights and its state are those of the last checkpoint."""


class Steps(TrainerCallback):
    """What `save_steps`, `log_steps` and the number of steps mean for a run that is resumed, and at its end."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and log as often as is asked for now: a checkpoint brings along how often it was.

        Raises:
            AllStepsDone: the Trainer would take one step more.
        """
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        if state.global_step >= state.max_steps:
            raise AllStepsDone

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step whatever `log_steps` is, also where a callback ends the training."""
        if control.should_training_stop:
            control.should_log = True


class TermTrainer(StagedTrainer):
    """A Trainer that logs, beside the loss, all that the model returns with it: means over the passes of all processes since
    the last log. Its checkpoints are whole or not there, and never hold weights that are not finite.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._terms: dict[str, list[Tensor]] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, as in the Trainer; its terms are kept for the log."""
        loss, outputs = super().compute_loss(model, {**inputs, **self.added_inputs()}, True, num_items_in_batch)
        for name, value in outputs.items():
            if name != "loss":
                self._terms.setdefault(name, []).append(value)
        return (loss, outputs) if return_outputs else loss

    def added_inputs(self) -> dict[str, Any]:
        """What the model is told of a pass beside its batch; asked once for each pass."""
        return {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms to the log.

        Raises:
            TwigVLMError: the loss is not finite any more.
        """
        if not math.isfinite(logs.get("loss", 0.0)):
            raise self.diverged(f"loss={logs['loss']}")
        values: dict[str, list[float]] = {}
        for part in processes.gather({name: torch.stack(terms).tolist() for name, terms in self._terms.items()}):
            for name, terms in part.items():
                values.setdefault(name, []).extend(terms)
        logs.update((name, math.fsum(terms) / len(terms)) for name, terms in values.items())
        self._terms = {}
        with self._writing("runs"):  # TensorBoard's
            super().log(logs, start_time)

    def check_weights(self, module: nn.Module) -> None:
        """Refuse weights that are not finite; all processes must call it.

        Args:
            module: what is trained.

        Raises:
            TwigVLMError: a weight is NaN or infinite, in whichever process.
        """
        finite = all(bool(fsdp.local(parameter).isfinite().all()) for parameter in module.parameters())
        if not all(processes.gather(finite)):
            raise self.diverged("NaN or infinite weights")

    def diverged(self, what: str) -> TwigVLMError:
        """The error of a training that diverged; `what` shows that it did."""
        return TwigVLMError(
            f"{what} by step {self.state.global_step}: the training diverged; start over in another directory with a lower "
            f"learning rate than {self.args.learning_rate:g}"
        )

    def create_accelerator_and_postprocess(self) -> None:
        """Reject accelerate settings that would be ignored.

        Raises:
            TwigVLMError: mixed precision is asked for, or sharding that a twig cannot have.
        """
        super().create_accelerator_and_postprocess()
        if self.accelerator.mixed_precision != "no":
            raise TwigVLMError(
                f"mixed_precision={self.accelerator.mixed_precision}: the twig computes in the base's data type; "
                "launch with 'no' and choose a dtype for the base"
            )
        fsdp.set_up(self.accelerator)
        self.is_fsdp_enabled = fsdp.wanted()

    def write_checkpoint(self, model: nn.Module, write: Callable[[str], None]) -> None:
        """Write it where nobody looks for checkpoints, and publish it when it is whole.

        Args:
            model: what is trained.
            write: writes `checkpoint-STEP` into a folder of this name in the output directory.

        Raises:
            TwigVLMError: weights are not finite, or the disk refuses.
        """
        self.check_weights(model)
        directory, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        # The Trainer's own is not whole when trainer_state.json is there: that file may be cut off, and other processes may
        # still be writing the state of their random streams.
        try:
            with self._writing(name):
                write(UNFINISHED)
                self.accelerator.wait_for_everyone()
                if processes.is_main():
                    publish(directory, name)
        except TwigVLMError:
            shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
            raise

    def _writing(self, name: str) -> AbstractContextManager[None]:
        """One line for what the disk refuses, which says how to go on."""
        directory = Path(self.args.output_dir)
        newest = latest(directory)
        remedy = "start again" if newest is None else f"resume from {newest.name}"
        return writing(str(directory / name), f"free space there, then {remedy}")


class CountingTrainer(TermTrainer):
    """Tells the model how many samples an optimiser step sees: the last step of an epoch may see fewer than the others."""

    _samples: Tensor | None = None  # of the step at hand, in all passes of all processes

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of an optimiser step, whose samples are counted as the Trainer counts their answer tokens."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=device)
        self._samples = self.accelerator.gather(samples).sum()
        return batches, tokens

    def added_inputs(self) -> dict[str, Any]:
        """The samples of the step at hand."""
        return {"samples_in_step": self._samples}
