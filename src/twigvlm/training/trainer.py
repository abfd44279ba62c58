"""What both stages share: Hugging Face's Trainer on the twig alone, its terms in the log, checkpoints, resuming."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigVLM
from twigvlm.training.data import Collator
from twigvlm.training.options import TrainingConfig

NO_LOSSES = ("grad_norm", "learning_rate", "epoch", "step")
"""Of what a Trainer logs."""


class TermTrainer(Trainer):
    """A Trainer that logs, beside the loss, all that the model returns with it: means over the passes since the last log."""

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
        """Add the terms to the log."""
        logs.update((name, float(torch.stack(values).mean())) for name, values in self._terms.items())
        self._terms = {}
        super().log(logs, start_time)


def fit(
    model: TwigVLM,
    pupil: Callable[[int], nn.Module],
    trainer_class: type[TermTrainer],
    data: Dataset[dict[str, Tensor]],
    config: TrainingConfig,
    directory: Path,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> list[dict[str, float]]:
    """Train the twig in place; arguments as in `train_stage1`.

    Args:
        pupil: from the number of optimiser steps, the twig with the loss of a stage.
        trainer_class: the Trainer of the stage.
    """
    base = model.base
    if base.dtype == torch.float16:
        raise TwigVLMError("dtype=float16: gradients underflow in it; train with bfloat16 or float32")
    samples = len(data)  # type: ignore[arg-type]
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(samples / (config.batch_size * config.accumulate)))
    module = pupil(steps)
    data[0]  # what is wrong with every sample shows before anything is written
    checkpoint = _latest(directory) if resume else None
    _remember(
        directory, {**dataclasses.asdict(model.config), **dataclasses.asdict(config), "samples": samples}, checkpoint
    )
    cpu = model.model.device.type == "cpu"
    arguments = TrainingArguments(
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
        save_total_limit=2,
        logging_steps=config.log_steps,
        report_to=["tensorboard"] if config.tensorboard else "none",
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=config.seed,
        use_cpu=cpu,
        disable_tqdm=True,
    )
    model.twig.float()
    trainer = trainer_class(
        model=module,
        args=arguments,
        train_dataset=data,
        data_collator=Collator(pad_token_id=0),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.twig.to(base.dtype)
    model.train(False)
    model.twig.record.append(_entry(config, samples, trainer.state))
    return trainer.state.log_history


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
    """The last checkpoint that was written to its end: the Trainer writes `trainer_state.json` last."""
    whole = [file.parent for file in directory.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def _remember(directory: Path, settings: dict[str, Any], checkpoint: Path | None) -> None:
    """Keep the settings beside the checkpoints; a run goes on only with the ones it began with."""
    file = directory / "settings.json"
    text = json.dumps(settings, indent=1) + "\n"
    if checkpoint is not None and file.is_file():
        before = json.loads(file.read_text())
        for name, value in json.loads(text).items():
            if before.get(name) != value:
                raise TwigVLMError(
                    f"{name}={value}: the checkpoint in {str(directory)!r} was trained with {before.get(name)}; "
                    "resume with the same settings or choose another directory"
                )
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
