"""What all trainings share: Hugging Face's Trainer on a part beside the frozen base, begun or resumed in a directory."""

import dataclasses
import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from twigvlm.base.vlm import BaseVLM
from twigvlm.checkpoints.twig_files import fingerprint
from twigvlm.compat.trainer import use_one_gpu
from twigvlm.errors import TwigVLMError
from twigvlm.files import reserved
from twigvlm.model import TwigVLM
from twigvlm.training.checks import check_device, check_trainable, limit_length
from twigvlm.training.data.dataset import Collator
from twigvlm.training.distributed import fsdp, processes
from twigvlm.training.options import TrainingConfig
from twigvlm.training.run_directory import UNFINISHED, check_checkpoint, check_room, check_settings, latest
from twigvlm.training.trainer import AllStepsDone, Steps, TermTrainer

NO_LOSSES = ("grad_norm", "learning_rate", "epoch", "step")
"""Of what a Trainer logs."""


@dataclass(frozen=True)
class Run:
    """What a training is asked for; see the arguments of `train_stage1`."""

    data: Dataset[dict[str, Tensor]]
    config: TrainingConfig
    directory: Path
    resume: bool
    callbacks: Sequence[TrainerCallback]


def fit(
    base: BaseVLM,
    part: nn.Module,
    shape: Mapping[str, Any],
    through: Iterable[nn.Parameter],
    make_student: Callable[[int], nn.Module],
    trainer_class: type[TermTrainer],
    run: Run,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train a part in place.

    Args:
        base: the frozen base.
        part: what is trained.
        shape: all that it depends on beside the settings; a run is resumed with the same only.
        through: parameters of the base that gradients pass on their way to the part.
        make_student: from the number of optimiser steps, the part with its loss; called when samples are cut as in the training.
        trainer_class: the Trainer.
        run: the training.

    Returns:
        The Trainer's log, and what a record says of the training.

    Raises:
        TwigVLMError: the base, the data, the launch, the directory or the checkpoint are unfit, or the training diverges.
    """
    data, config, directory = run.data, run.config, run.directory
    check_trainable(base, through)
    samples = limit_length(base, data)
    together = config.batch_size * config.accumulate * processes.count()
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(samples / together))
    module = make_student(steps)
    data[0]  # what is wrong with every sample shows before anything is written
    with reserved(directory, "directory") if processes.is_main() else nullcontext():
        checkpoint = _checkpoint(run)
        check_settings(directory, _settings(base, shape, config, data, samples), checkpoint)
        if processes.is_main():
            shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
            check_room(directory, module, math.ceil(steps / config.save_steps))
        arguments = _arguments(config, directory, steps, base.device)
        check_device(arguments.device, base.device)
        use_one_gpu(arguments)
        part.float()
        try:
            state = _train(trainer_class, module, arguments, run, checkpoint)
        finally:
            part.to(base.dtype)
            part.train(False)
    return state.log_history, _entry(config, samples, state)


def fit_twig(
    model: TwigVLM,
    stays: Mapping[str, Tensor],
    make_student: Callable[[int], nn.Module],
    trainer_class: type[TermTrainer],
    run: Run,
) -> list[dict[str, float]]:
    """`fit` on a twig, which takes the training into its record.

    Args:
        model: the twig with its base.
        stays: weights of the twig that the training does not change. With the record of earlier trainings they tell which twig
            it starts from, also when a run that was interrupted goes on in the same process.
        make_student: as in `fit`.
        trainer_class: the Trainer.
        run: the training.

    Returns:
        The Trainer's log.

    Raises:
        TwigVLMError: there is no twig, or an error of `fit`.
    """
    twig = model.twig
    if twig.is_stand_in:
        raise TwigVLMError("this model has no twig to train; grow one with TwigVLM.grow")
    shares_head = twig.head is None and twig.head_rows is None
    through = model.base.head.parameters() if shares_head else ()
    shape = {**dataclasses.asdict(twig.config), "start": _digest(twig.record, stays)}
    log, entry = fit(model.base, twig, shape, through, make_student, trainer_class, run)
    twig.record.append(entry)
    return log


def _digest(record: list[dict[str, Any]], weights: Mapping[str, Tensor]) -> str:
    """Twelve characters that change with a record and with weights."""
    whole = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for tensor in weights.values():
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:12]


def _without_traceback(error: TwigVLMError) -> TwigVLMError | None:
    """An error of a process that reads samples, without that process's traceback in its message; None: it is of this process."""
    kind = type(error)
    traceback, _, message = str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")
    return kind(message.strip()) if traceback else None


def _settings(
    base: BaseVLM, shape: Mapping[str, Any], config: TrainingConfig, data: Dataset[dict[str, Tensor]], samples: int
) -> dict[str, Any]:
    """All that the part depends on, which a run goes on with."""
    return {
        "training": _stage(config),
        **shape,
        **dataclasses.asdict(config),
        "samples": samples,
        "data": getattr(data, "digest", None),
        "max_length": getattr(data, "max_length", None),
        "dtype": str(base.dtype),
        "base": zlib.crc32(json.dumps(fingerprint(base)).encode()),
        "processes": processes.count(),
        "sharded": fsdp.wanted(),
    }


def _checkpoint(run: Run) -> Path | None:
    """The checkpoint that a run goes on from; None: there is none."""
    checkpoint = latest(run.directory)
    if checkpoint is not None:
        if not run.resume:
            raise TwigVLMError(
                f"directory {str(run.directory)!r}: holds checkpoints; resume, or choose another directory"
            )
        check_checkpoint(checkpoint)
    return checkpoint


def _train(
    trainer_class: type[TermTrainer],
    module: nn.Module,
    arguments: TrainingArguments,
    run: Run,
    checkpoint: Path | None,
) -> TrainerState:
    """Run the Trainer, which prints nothing by itself, from the checkpoint to the last step."""
    processes.broadcast_weights(module)
    trainer = trainer_class(
        model=module,
        args=arguments,
        train_dataset=run.data,
        data_collator=Collator(pad_token_id=0),
        callbacks=[*run.callbacks, Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with suppress(AllStepsDone):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        fsdp.unshard(module)
        trainer.check_weights(module)
    except TwigVLMError as error:
        if (original := _without_traceback(error)) is None:
            raise
        raise original from None
    return trainer.state


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
        ddp_find_unused_parameters=False,  # trainings use all that they train, in every pass
        disable_tqdm=True,
        logging_nan_inf_filter=False,
    )


def _stage(config: TrainingConfig) -> str:
    """The kind of training: "stage1", "stage2" or "projector"."""
    return type(config).__name__.removesuffix("Config").lower()


def _entry(config: TrainingConfig, samples: int, state: TrainerState) -> dict[str, Any]:
    """What a record says of a training: its last losses are means over the passes since the log entry before."""
    last: dict[str, float] = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    return {
        "stage": _stage(config),
        "samples": samples,
        "steps": state.global_step,
        "batch": config.batch_size * config.accumulate * processes.count(),
        "final": {name: value for name, value in last.items() if name not in NO_LOSSES},
        "settings": dataclasses.asdict(config),
    }
