"""What both stages share: Hugging Face's Trainer on the twig alone, its terms in the log, checkpoints, resuming."""

import dataclasses
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from twigvlm.checkpoints.twig_files import fingerprint
from twigvlm.compat.trainer import StagedTrainer, use_one_gpu
from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing, reserved, writing
from twigvlm.model import TwigVLM
from twigvlm.training.data.dataset import Collator
from twigvlm.training.data.samples import BrokenSample
from twigvlm.training.distributed import fsdp, processes
from twigvlm.training.options import TrainingConfig

UNFINISHED = "unfinished"
"""Folder in which a checkpoint is written before it is moved to where it is looked for."""
KEPT = 2
"""Checkpoints that are kept, the latest ones."""
NO_LOSSES = ("grad_norm", "learning_rate", "epoch", "step")
"""Of what a Trainer logs."""
FREE = ("workers", "log_steps", "save_steps", "tensorboard", "gradient_checkpointing")
"""Settings that may change when a run goes on, since the twig does not depend on them."""


class LogLastStep(TrainerCallback):
    """The last step is logged whatever `log_steps` is, also where a callback ends the training."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the step if the training ends with it."""
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
        """The loss; its terms are kept for the log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name, value in outputs.items():
            if name != "loss":
                self._terms.setdefault(name, []).append(value)
        return (loss, outputs) if return_outputs else loss

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

        Raises:
            TwigVLMError: a weight is NaN or infinite, in whichever process.
        """
        finite = all(bool(fsdp.local(parameter).isfinite().all()) for parameter in module.parameters())
        if not all(processes.gather(finite)):
            raise self.diverged("NaN or infinite weights")

    def diverged(self, what: str) -> TwigVLMError:
        """The error of a training that diverged."""
        return TwigVLMError(
            f"{what} by step {self.state.global_step}: the training diverged; start over in another directory with a lower "
            f"learning rate than {self.args.learning_rate:g}"
        )

    def create_accelerator_and_postprocess(self) -> None:
        """Reject accelerate settings that would be ignored."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.mixed_precision != "no":
            raise TwigVLMError(
                f"mixed_precision={self.accelerator.mixed_precision}: the twig computes in the base's number format; "
                "launch with 'no' and choose a dtype for the base"
            )
        fsdp.set_up(self.accelerator)
        self.is_fsdp_enabled = fsdp.wanted()

    def write_checkpoint(self, model: nn.Module, write: Callable[[str], None]) -> None:
        """Write it where nobody looks for checkpoints, and publish it when it is whole.

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
                    _publish(directory, name)
        except TwigVLMError:
            shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
            raise

    def _writing(self, name: str) -> AbstractContextManager[None]:
        """One line for what the disk refuses, which says how to go on."""
        directory = Path(self.args.output_dir)
        newest = _latest(directory)
        remedy = "start again" if newest is None else f"resume from {newest.name}"
        return writing(str(directory / name), f"free space there, then {remedy}")


def fit(
    model: TwigVLM,
    make_student: Callable[[int], nn.Module],
    trainer_class: type[TermTrainer],
    data: Dataset[dict[str, Tensor]],
    config: TrainingConfig,
    directory: Path,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> list[dict[str, float]]:
    """Train the twig in place; arguments as in `train_stage1`.

    Args:
        make_student: from the number of optimiser steps, the twig with the loss of a stage.
        trainer_class: the Trainer of the stage.

    Returns:
        The Trainer's log.

    Raises:
        TwigVLMError: the base, the data, the launch, the directory or the checkpoint are unfit, or the training diverges.
    """
    base = model.base
    if base.dtype == torch.float16:
        raise TwigVLMError("dtype=float16: gradients underflow in it; train with bfloat16 or float32")
    if not torch.is_grad_enabled():
        raise TwigVLMError(
            "torch.no_grad or torch.inference_mode: nothing can be trained under it; train outside of it"
        )
    shares_head = model.twig.head is None and model.twig.head_rows is None
    if shares_head and any(parameter.is_inference() for parameter in base.head.parameters()):
        raise TwigVLMError(
            "base: was loaded under torch.inference_mode, and the twig shares its head; load it outside of it"
        )
    samples = len(data)  # type: ignore[arg-type]
    together = config.batch_size * config.accumulate * processes.count()
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(samples / together))
    module = make_student(steps)
    data[0]  # what is wrong with every sample shows before anything is written
    with reserved(directory, "directory") if processes.is_main() else nullcontext():
        checkpoint = _latest(directory)
        if checkpoint is not None and not resume:
            raise TwigVLMError(f"directory {str(directory)!r}: holds checkpoints; resume, or choose another directory")
        launch = {
            "samples": samples,
            "max_length": getattr(data, "max_length", None),
            "dtype": str(base.dtype),
            "base": zlib.crc32(json.dumps(fingerprint(base)).encode()),
            "processes": processes.count(),
            "sharded": fsdp.wanted(),
        }
        settings = {**dataclasses.asdict(model.twig.config), **dataclasses.asdict(config), **launch}
        _check_settings(directory, settings, checkpoint)
        if processes.is_main():
            shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
            _check_room(directory, module, math.ceil(steps / config.save_steps))
        arguments = _arguments(config, directory, steps, model.device)
        _check_device(arguments.device, model.device)
        use_one_gpu(arguments)
        model.twig.float()
        processes.broadcast_weights(module)
        trainer = trainer_class(
            model=module,
            args=arguments,
            train_dataset=data,
            data_collator=Collator(pad_token_id=0),
            callbacks=[*callbacks, LogLastStep()],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            fsdp.unshard(module)
            trainer.check_weights(module)
        except BrokenSample as error:  # from a process beside the training it brings that process's traceback along
            raise BrokenSample(str(error).rpartition("BrokenSample: ")[2].strip()) from None
        finally:
            model.twig.checkpoint_gradients(False)
            model.twig.to(base.dtype)
            model.train(False)
    model.twig.record.append(_entry(config, samples, trainer.state))
    return trainer.state.log_history


def _arguments(config: TrainingConfig, directory: Path, steps: int, device: torch.device) -> TrainingArguments:
    """The Trainer's own settings."""
    cpu = device.type == "cpu"
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup * steps),
        save_steps=config.save_steps,
        logging_steps=config.log_steps,
        report_to=["tensorboard"] if config.tensorboard else "none",
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
        use_cpu=cpu,
        ddp_find_unused_parameters=False,  # both stages use all that they train, in every pass
        disable_tqdm=True,
        logging_nan_inf_filter=False,
    )


def _check_room(directory: Path, module: nn.Module, saves: int) -> None:
    """Refuse a disk that is too full for the checkpoints of a run: those that are kept, and the one that is being written.

    Args:
        directory: of the checkpoints.
        module: what they hold, in float32, with two more numbers for every weight that is trained.
        saves: checkpoints that the run writes.
    """
    parameters = list(module.parameters())
    size = 4 * sum(parameter.numel() * (3 if parameter.requires_grad else 1) for parameter in parameters)
    needed = size * max(0, min(saves, KEPT + 1) - len(_whole(directory)))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise TwigVLMError(
            f"directory {str(directory)!r}: {free / 1e9:.1f} GB are free, and the checkpoints need {needed / 1e9:.1f} GB; free "
            "space there, or choose another directory"
        )


def _check_device(chosen: torch.device, device: torch.device) -> None:
    """The Trainer chooses its device by itself; the base must be there."""
    if (chosen.type, chosen.index or 0) != (device.type, device.index or 0):
        raise TwigVLMError(
            f"device {str(device)!r}: this process trains on {str(chosen)!r}; load the base there, "
            "or choose GPUs by CUDA_VISIBLE_DEVICES"
        )


def _publish(directory: Path, name: str) -> None:
    """Move a finished checkpoint to where it is looked for, and remove old ones."""
    mode = (directory / UNFINISHED / name / "trainer_state.json").stat().st_mode
    for file in (directory / UNFINISHED / name).iterdir():
        file.chmod(mode)  # safetensors writes for the owner alone
    shutil.rmtree(directory / name, ignore_errors=True)
    os.replace(directory / UNFINISHED / name, directory / name)
    (directory / UNFINISHED).rmdir()
    for old in _whole(directory)[:-KEPT]:
        shutil.rmtree(old)


def _whole(directory: Path) -> list[Path]:
    """Checkpoints, the latest last."""
    found = [file.parent for file in directory.glob("checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _entry(config: TrainingConfig, samples: int, state: TrainerState) -> dict[str, Any]:
    """What the twig's record says of a stage: its last losses are means over the passes since the log entry before."""
    last: dict[str, float] = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    return {
        "stage": type(config).__name__.removesuffix("Config").lower(),
        "samples": samples,
        "steps": state.global_step,
        "final": {name: value for name, value in last.items() if name not in NO_LOSSES},
        "settings": dataclasses.asdict(config),
    }


def _latest(directory: Path) -> Path | None:
    return next(reversed(_whole(directory)), None)


def _check_settings(directory: Path, settings: dict[str, Any], checkpoint: Path | None) -> None:
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
