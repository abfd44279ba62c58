"""FitPrune's schedule, calibrated on the questions of conversations."""

from pathlib import Path
from typing import Any

from torch import Tensor

from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods.fitprune import FitPrune
from twigvlm.training.data.dataset import ConversationDataset, is_per_token
from twigvlm.training.data.turns import last_prompt_tokens


class CalibratedSchedule:
    """A base, which stays as it is, and the schedule that is fitted to it."""

    def __init__(self, base: BaseVLM) -> None:
        self.base = base
        self.pruner = FitPrune(())

    def fit(self, data: ConversationDataset, retain: float, count: int) -> None:
        """Fit the schedule to the first questions of samples.

        Args:
            data: the samples.
            retain: R̄ of the schedule, on the average of the prompts' visual tokens.
            count: samples to take, the first.

        Raises:
            TwigVLMError: none of the samples has an image before its first answer, or the budget is out of range.
        """
        base, taken = self.base, min(count, len(data))
        data.context = base.context
        prompts = [prompt for prompt in (_prompt(base, data[index]) for index in range(taken)) if prompt]
        if not prompts:
            raise TwigVLMError(
                f"none of the first {taken} conversations has images in its first question alone; give others"
            )
        visual = sum(int(base.visual_mask(prompt["input_ids"]).sum()) for prompt in prompts) / len(prompts)
        if not visual / base.num_layers < retain <= visual:
            raise TwigVLMError(
                f"retain={retain:g}: must be more than {visual / base.num_layers:.1f}, and at most {visual:.1f}, the "
                "average of the prompts' visual tokens"
            )
        self.pruner = FitPrune.calibrated(base, prompts, retain / visual)

    def save_pretrained(self, folder: Path) -> None:
        """Write the schedule to a directory, for `pruner="fitprune:DIRECTORY"`."""
        self.pruner.save_pretrained(folder)


def _prompt(base: BaseVLM, sample: dict[str, Tensor]) -> dict[str, Any] | None:
    """What the processor would say of a sample's first question; None: there is no image in it, or one after it."""
    length = sample["input_ids"].shape[1]
    end = int(last_prompt_tokens(sample["labels"])[0].nonzero()[0, 0]) + 1
    prompt = {
        name: (value[:, :end] if is_per_token(value, length) else value).to(base.device)
        for name, value in sample.items()
        if name not in ("attention_mask", "labels")
    }
    visual = base.visual_mask(sample["input_ids"].to(base.device))[0]
    return prompt if visual[:end].any() and not visual[end:].any() else None
