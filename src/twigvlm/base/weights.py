"""The weights of a base's modules as plain tensors, wherever accelerate keeps them and however they are quantised."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from twigvlm import compat


@torch.no_grad()
def plain_weights(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The weights of a module and of all below it, by name. They may share the module's memory.

    Whatever a quantised linear layer holds, its weights are what it makes of the unit vectors.

    Args:
        module: part of the base.
        dtype: data type of the result.
        device: device of the result.
    """
    weights: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        if hasattr(part, "in_features") and is_quantised(getattr(part, "weight", None)):
            found = _measured(part, dtype, device)
        else:
            with compat.present(part):
                found = {name: parameter.detach() for name, parameter in part.named_parameters(recurse=False)}
        names = (compat.uncompiled_name(f"{path}.{name}").lstrip(".") for name in found)
        weights.update((name, tensor.to(device, dtype)) for name, tensor in zip(names, found.values(), strict=True))
    return weights


def _measured(linear: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    made = linear(torch.eye(linear.in_features, dtype=dtype, device=device)).T
    bias = bias_of(linear)
    if bias is None:
        return {"weight": made}
    return {"weight": made - bias.to(made)[:, None], "bias": bias}


def bias_of(linear: Any) -> Tensor | None:
    """The bias of a linear layer, for which torch's quantised layers have a method."""
    bias = getattr(linear, "bias", None)
    return cast("Tensor | None", bias() if callable(bias) else bias)


def is_quantised(weight: Any) -> bool:
    """Whether a weight is hidden, holds codes, or is rounded more coarsely than its dtype says."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return True
    return type(weight).__module__.startswith("torchao.")
