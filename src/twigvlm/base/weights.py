"""The weights of a base's modules as plain tensors, wherever accelerate keeps them and however they are quantised."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def plain_weights(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The weights of a module and of all below it, by name. They may share the module's memory.

    Whatever a quantised linear layer holds, its weights are what it makes of the unit vectors.
    """
    weights: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        if hasattr(part, "in_features") and is_quantised(getattr(part, "weight", None)):
            found = _measured(part, dtype, device)
        else:
            with present(part):
                found = {name: parameter.detach() for name, parameter in part.named_parameters(recurse=False)}
        weights.update((f"{path}.{name}".lstrip("."), tensor.to(device, dtype)) for name, tensor in found.items())
    return weights


def _measured(linear: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    made = linear(torch.eye(linear.in_features, dtype=dtype, device=device)).T
    bias = getattr(linear, "bias", None)
    if bias is None:
        return {"weight": made}
    return {"weight": made - bias.to(made)[:, None], "bias": bias}


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within this context a module's own weights are there, even if accelerate has them on the disk until it is called."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def is_quantised(weight: Tensor | None) -> bool:
    """Whether a weight is hidden, holds codes, or is rounded more coarsely than its dtype says."""
    if weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return True
    return type(weight).__module__.startswith("torchao.")
