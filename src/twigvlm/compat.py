"""Private and version-dependent names of torch, transformers and accelerate, each in one function with the version it was seen in.

`tests/test_compat.py` holds each of them to what it is for, so that a new version that renames one fails there.
"""

from typing import cast

import torch
from torch import Tensor, nn

HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of torch has oneDNN's linear layer (torch 2.13: on x86 and on ARM under Linux)."""


def onednn_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b by oneDNN, which `nn.functional.linear` takes for other formats than float32 only.

    `torch.ops.mkldnn._linear_pointwise` (torch 2.13): what inductor compiles a linear layer to. It has no gradients.
    """
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], ""))


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by `module.compile()` or by `torch.compile(module)`.

    `_compiled_call_impl` and `_orig_mod` (torch 2.13).
    """
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
