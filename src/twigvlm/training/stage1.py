"""Stage 1 in its simplest form: the shallow model (trunk + twig) learns the next token of answers; the base is frozen."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigVLM
from twigvlm.training.data import IGNORE, Collator
from twigvlm.training.losses import draft_targets, next_token_loss
from twigvlm.training.options import Stage1Config


class ShallowModel(nn.Module):
    """The shallow model as the Trainer sees it: its parameters, and so the checkpoints, are the twig's alone.

    The twig holds float32 weights and runs in the base's number format under autocast.
    """

    accepts_loss_kwargs = True  # the Trainer hands in the number of answer tokens that an optimiser step sees

    def __init__(self, model: TwigVLM) -> None:
        super().__init__()
        self.twig = model.twig
        self._whole = (model,)  # in a tuple, so that the base is no submodule

    def forward(self, labels: Tensor, num_items_in_batch: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """Loss of a batch padded on the right: without a mask, causal attention hides padding from every real token."""
        inputs.pop("attention_mask", None)
        base, twig = self._whole[0].base, self.twig
        with torch.no_grad():
            prompt = base.prompt(**inputs)
            masks = base.masks(prompt)
            rope = base.rope(prompt)
            hidden = base.run_layers(prompt.hidden, 0, twig.config.trunk_layers, rope, masks)
        answers = labels[:, 1:] != IGNORE
        with torch.autocast(hidden.device.type, base.dtype, enabled=base.dtype != torch.float32):
            hidden = twig(hidden.float(), rope, masks)
            logits = twig.logits(hidden[:, :-1][answers])
        vocabulary = int(cast(Any, base.head).weight.shape[0])
        targets = draft_targets(labels[:, 1:][answers], twig.draft_token_ids, vocabulary)
        return {"loss": next_token_loss(logits, targets, num_items_in_batch)}


def train_stage1(
    model: TwigVLM,
    data: Dataset[dict[str, Tensor]],
    config: Stage1Config,
    directory: Path,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train the twig in place.

    Args:
        model: its twig is trained in float32 and ends in the base's number format; its base stays as it is.
        data: samples as `ConversationDataset` yields them.
        config: settings.
        directory: for checkpoints, which hold the twig, the optimiser and the place in the data.
        resume: continue from the latest checkpoint in `directory`, if there is one.
        callbacks: of the Trainer, for example to show progress.

    Returns:
        The Trainer's log.
    """
    base = model.base
    if base.dtype == torch.float16:
        raise TwigVLMError("dtype=float16: gradients underflow in it; train with bfloat16 or float32")
    samples = len(data)  # type: ignore[arg-type]
    data[0]  # what is wrong with every sample shows before anything is written
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(samples / (config.batch_size * config.accumulate)))
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
    trainer = Trainer(
        model=ShallowModel(model),
        args=arguments,
        train_dataset=data,
        data_collator=Collator(pad_token_id=0),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.twig.to(base.dtype)
    model.train(False)
    return trainer.state.log_history


def _latest(directory: Path) -> Path | None:
    """The last checkpoint that was written to its end: the Trainer writes `trainer_state.json` last."""
    whole = [file.parent for file in directory.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def _remember(directory: Path, settings: dict[str, Any], checkpoint: Path | None) -> None:
    """Keep the settings beside the checkpoints; a run goes on only with the ones it began with."""
    file = directory / "settings.json"
    if checkpoint is not None and file.is_file():
        before = json.loads(file.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise TwigVLMError(
                    f"{name}={value}: the checkpoint in {str(directory)!r} was trained with {before.get(name)}; "
                    "resume with the same settings or choose another directory"
                )
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")
