"""What a training is refused for before it begins: a base, data or a device that it cannot have."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.training.data.dataset import ConversationDataset


def check_trainable(base: BaseVLM, through: Iterable[nn.Parameter]) -> None:
    """Refuse a base through which no gradients can flow, or only such that vanish.

    Args:
        base: the frozen base.
        through: parameters of the base that gradients pass on their way to what is trained.

    Raises:
        TwigVLMError: the base is in float16, or gradients are off.
    """
    if base.dtype == torch.float16:
        raise TwigVLMError("dtype=float16: gradients underflow in it; train with bfloat16 or float32")
    if not torch.is_grad_enabled():
        raise TwigVLMError(
            "torch.no_grad or torch.inference_mode: nothing can be trained inside it; train outside of it"
        )
    if any(parameter.is_inference() for parameter in through):
        raise TwigVLMError(
            "base: was loaded inside torch.inference_mode, and gradients pass through it; load it outside"
        )


def limit_length(base: BaseVLM, data: Dataset[dict[str, Tensor]]) -> int:
    """Have samples cut where the base's context ends, which it would refuse in the middle of the training.

    Args:
        base: the frozen base.
        data: the samples, a `ConversationDataset`; others are taken as they are.

    Returns:
        The number of samples.

    Raises:
        TwigVLMError: there is none, or samples are to be cut only beyond the context.
    """
    samples = len(data)  # type: ignore[arg-type]
    if not samples:
        raise TwigVLMError("data: holds no samples; give at least one conversation")
    limit = getattr(data, "max_length", None)
    if base.context is not None and limit is not None and limit > base.context:
        raise TwigVLMError(f"max_length={limit}: must be at most {base.context}, the context of this base")
    if isinstance(data, ConversationDataset):
        data.context = base.context
    return samples


def check_device(chosen: torch.device, device: torch.device) -> None:
    """The Trainer chooses its device by itself; the base must be there.

    Args:
        chosen: the Trainer's device.
        device: the base's.

    Raises:
        TwigVLMError: they differ.
    """
    if (chosen.type, chosen.index or 0) != (device.type, device.index or 0):
        raise TwigVLMError(
            f"device {str(device)!r}: this process trains on {str(chosen)!r}; load the base there, "
            "or choose GPUs by CUDA_VISIBLE_DEVICES"
        )


def first_with_picture(base: BaseVLM, data: Dataset[dict[str, Tensor]]) -> tuple[dict[str, Tensor], int]:
    """The first sample with a picture, and how many visual tokens it has.

    Args:
        base: the frozen base.
        data: the samples.

    Raises:
        TwigVLMError: no sample has a picture.
    """
    for index in range(len(data)):  # type: ignore[arg-type]
        sample = data[index]
        visual = int(base.visual_mask(sample["input_ids"]).sum())
        if visual:
            return sample, visual
    raise TwigVLMError("data: no sample has a picture; add some, since this training learns from pictures alone")
