"""Passes over few tokens on a CPU, which read every weight for them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST = 64
"""Tokens of such a pass."""


class _WeightFirst(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs:
            states, weight, *bias = args
            product = (weight @ states.flatten(0, -2).T).T.contiguous().unflatten(0, states.shape[:-1])
            return product if not bias or bias[0] is None else product + bias[0]
        return func(*args, **(kwargs or {}))


def few_rows(hidden: Tensor) -> AbstractContextManager[Any]:
    """Within it, linear layers of such a pass compute (W·xᵀ)ᵀ instead of x·Wᵀ.

    The BLAS libraries of CPUs multiply a large matrix with a thin one about as fast as with a vector, but the other way round
    they copy the large one first. So several drafted tokens are verified, or rows of a batch decoded, in the time of one.

    Args:
        hidden: states of the pass, [..., width]. Elsewhere than on a CPU, in other formats than float32, for one token, for more
            than `MOST`, and where gradients are wanted, nothing changes.
    """
    tokens = hidden.shape[:-1].numel()
    fits = 1 < tokens <= MOST and hidden.device.type == "cpu" and hidden.dtype == torch.float32
    return _WeightFirst() if fits and not torch.is_grad_enabled() else nullcontext()
