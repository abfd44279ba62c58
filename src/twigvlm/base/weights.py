"""The weights of a base's modules as plain tensors, wherever accelerate keeps them and however they are quantised."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn


def plain_weights(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The weights of a module and of all below it, by name, dequantised.

    They may share the module's memory. What is quantised otherwise than by bitsandbytes or torchao comes as it is.
    """
    weights: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        with present(part):
            for name, parameter in part.named_parameters(prefix=path, recurse=False):
                weights[name] = _dequantised(part, parameter).detach().to(device, dtype)
    return weights


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within this context a module's own weights are there, even if accelerate has them on the disk until it is called."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def is_quantised(parameter: Tensor) -> bool:
    """Whether it holds codes, or numbers rounded more coarsely than its dtype says."""
    return not parameter.is_floating_point() or type(parameter).__module__.startswith("torchao.")


def _dequantised(module: nn.Module, parameter: nn.Parameter) -> Tensor:
    backend = type(parameter).__module__.split(".")[0]
    if backend == "bitsandbytes":
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return cast(Tensor, dequantize_bnb_weight(parameter, getattr(module, "state", None)))
    return parameter.dequantize() if backend == "torchao" else parameter
