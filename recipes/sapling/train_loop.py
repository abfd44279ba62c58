"""The training loop that the recipe's steps share: AdamW, cosine, and checkpoints from which a stopped run goes on."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from twigvlm.files import replacing
from twigvlm.training.run_directory import latest
from twigvlm.training.trainer import AllStepsDone, Steps


def train(
    model: nn.Module,
    data: Dataset,
    output: str,
    steps: int,
    batch: int,
    rate: float,
    warmup: int,
    weight_decay: float = 0.0,
    collate: Callable | None = None,
) -> None:
    """Train in place, from the newest checkpoint in `output` if there is one; ends with `final.safetensors` there."""
    set_seed(0)
    trainer = Trainer(
        model,
        TrainingArguments(
            output,
            use_cpu=True,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            adam_beta2=0.98,
            weight_decay=weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=warmup,
            logging_steps=10,
            save_steps=25,
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=[],
        ),
        train_dataset=data,
        data_collator=collate,
        callbacks=[Steps()],
    )
    checkpoint = latest(Path(output))  # the Trainer would also take one that was cut off
    with suppress(AllStepsDone):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with replacing(Path(output) / "final.safetensors") as temporary:
        save_file(weights, temporary)
