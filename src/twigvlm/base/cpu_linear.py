"""Passes over few tokens on a CPU, which read every weight for them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 64
"""Tokens of such a pass."""

_USUAL = nn.Linear.forward


def cpu_linear(hidden: Tensor) -> AbstractContextManager[None]:
    """Within it, linear layers of such a pass compute (W·xᵀ)ᵀ instead of x·Wᵀ.

    The BLAS libraries of CPUs multiply a large matrix with a thin one about as fast as with a vector, but the other way round
    they copy the large one first. So a few drafted tokens are verified, or rows of a batch decoded, in the time of one.

    Args:
        hidden: states of the pass, [..., width]. Elsewhere than on a CPU, in other formats than float32, for one token, for more
            than `MOST`, and where gradients are wanted, nothing changes.
    """
    return _weight_first() if _fits(hidden) else nullcontext()


def _fits(states: Tensor) -> bool:
    few = 1 < states.shape[:-1].numel() <= MOST
    plain = states.device.type == "cpu" and states.dtype == torch.float32
    return few and plain and not torch.is_grad_enabled()


# The class's forward is exchanged rather than the layers': a function mode would cost a millisecond a layer. Other threads
# that meet it meanwhile get the same products.
@contextmanager
def _weight_first() -> Iterator[None]:
    nn.Linear.forward = _forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Linear.forward = _USUAL  # type: ignore[method-assign]


def _forward(layer: nn.Linear, states: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if not _fits(states):
        return F.linear(states, weight, bias)
    # Contiguous, as what comes next is multiplied fast only then.
    product = (weight @ states.reshape(-1, states.shape[-1]).T).T.contiguous().view(*states.shape[:-1], -1)
    return product if bias is None else product + bias
