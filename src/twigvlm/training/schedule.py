"""FitPrune's schedule, calibrated on the questions of conversations."""

from typing import Any

from torch import Tensor

from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods.fitprune import FitPrune
from twigvlm.training.data.dataset import ConversationDataset, is_per_token
from twigvlm.training.data.turns import last_prompt_tokens


def calibrate_schedule(base: BaseVLM, data: ConversationDataset, retain: float, count: int) -> FitPrune:
    """The schedule that fits the first questions of samples.

    Args:
        base: the base, which stays as it is.
        data: the samples.
        retain: R̄ of the schedule, on the average of the prompts' visual tokens.
        count: samples to take, the first.

    Raises:
        TwigVLMError: none of the samples has an image before its first answer, or the budget is out of range.
    """
    taken = min(count, len(data))
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
    return FitPrune.calibrated(base, prompts, retain / visual)


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
