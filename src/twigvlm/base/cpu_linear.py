"""Faster CPU linear layers for passes over a few tokens."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import linear as torch_linear

from twigvlm import compat

HAS_SMALL_PRODUCTS = torch.backends.mkl.is_available() and "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))
"""Whether torch multiplies a few rows with a large matrix fast by itself, as MKL does on Intel's processors alone."""
MAX_TOKENS = 64
"""A pass over more tokens is left to torch."""
WEIGHT_FIRST = 5
"""Largest number of tokens for which (W·xᵀ)ᵀ is the fastest product; for more, oneDNN's is."""

_alone = False
_active: ContextVar[bool] = ContextVar("twigvlm_cpu_linear", default=False)
"""Whether this thread or task runs such a pass: other threads may call the same layers meanwhile."""
_installing = Lock()


def alone_in_process(alone: bool = True) -> None:
    """Declare that twigs are the only users of torch in this process, as in the commands.

    Passes over a single token are then up to three times as fast in bfloat16 on a CPU. torch has a fast product of a matrix
    and a vector, but uses oneDNN's slower one unless oneDNN is switched off, which affects the whole process. It is off for
    the duration of such a product; what another thread multiplies meanwhile is correct, but not bit for bit the same as
    otherwise. Therefore this is off by default.

    Args:
        alone: whether no other thread computes with torch while a model with a twig generates.
    """
    global _alone
    _alone = alone


def is_alone() -> bool:
    """What `alone_in_process` was told."""
    return _alone


def cpu_linear(module: nn.Module, hidden: Tensor) -> AbstractContextManager[None]:
    """Within this context the linear layers of a module use `linear`, in this thread or task alone.

    They get a forward of their own for as long as a pass runs. A layer whose forward is not torch's (a subclass, a user's
    patch, an accelerate hook, a compiled or quantised layer) is left alone, and nothing is installed where `linear` would do
    what torch does.

    Args:
        module: a linear layer, or a module that has some.
        hidden: states of the pass, [..., width].
    """
    return _installed(module) if _fits(hidden) and not torch.is_autocast_enabled("cpu") else nullcontext()


def linear(
    states: Float[Tensor, "*tokens width"],
    weight: Float[Tensor, "out width"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*tokens out"]:
    """x·Wᵀ + b, in the fastest way for a few tokens on a CPU in float32, and for one in bfloat16; elsewhere by torch's `linear`.

    To multiply a few rows with a large matrix, the BLAS libraries of CPUs copy the matrix first. For (W·xᵀ)ᵀ they do not, and
    read the weights once for all tokens. MKL multiplies a single vector on one core, so one token is given to it twice. On
    Intel's processors it does neither; there only the product of a matrix and a vector is faster than torch's `linear`.
    """
    # Some weights only pass for plain ones: tensor subclasses (quantised, sharded), sparse ones.
    plain = type(weight) in (nn.Parameter, Tensor) and weight.dtype == states.dtype and weight.layout == torch.strided
    if not (plain and _fits(states)):
        return F.linear(states, weight, bias)
    rows = states.reshape(-1, states.shape[-1])
    if states.dtype == torch.bfloat16 or HAS_SMALL_PRODUCTS:
        with compat.without_onednn() if states.dtype == torch.bfloat16 else nullcontext():
            product = torch.mv(weight, rows[0]).view(*states.shape[:-1], -1)
        return product if bias is None else product + bias
    count = len(rows)
    if count > WEIGHT_FIRST and compat.HAS_ONEDNN_LINEAR:
        return compat.onednn_linear(states, weight, bias)
    if count == 1:
        if not torch.backends.mkl.is_available():
            return F.linear(states, weight, bias)
        rows = torch.cat((rows, rows))
    # Contiguous, as what comes next is multiplied fast only then.
    product = (weight @ rows.T).T[:count].contiguous().view(*states.shape[:-1], -1)
    return product if bias is None else product + bias


def _fits(states: Tensor) -> bool:
    if states.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if states.dtype == torch.bfloat16:
        return _alone and states.numel() == states.shape[-1] and compat.HAS_ONEDNN_SWITCH
    longest = 1 if HAS_SMALL_PRODUCTS else MAX_TOKENS
    return states.dtype == torch.float32 and 0 < states.numel() <= longest * states.shape[-1]


class _Forward:
    """The forward of a linear layer as long as passes over a few tokens run in any thread."""

    __slots__ = ("layer", "passes")

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.passes = 0

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.layer
        return linear(input, layer.weight, layer.bias) if _active.get() else type(layer).forward(layer, input)


@contextmanager
def _installed(module: nn.Module) -> Iterator[None]:
    layers = _linears(module)
    with _installing:
        for layer in layers:
            forward = vars(layer).setdefault("forward", _Forward(layer))
            if type(forward) is _Forward:
                forward.passes += 1
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)
        with _installing:
            for layer in layers:
                forward = vars(layer).get("forward")
                if type(forward) is _Forward:
                    forward.passes -= 1
                    if not forward.passes:
                        del vars(layer)["forward"]


def _linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a module that run torch's own forward."""
    if isinstance(module, nn.Linear):
        # A patched class, or a subclass with a forward of its own, shows by where that function is from.
        from_torch = getattr(type(module).forward, "__globals__", None) is vars(torch_linear)
        unpatched = type(vars(module).get("forward")) in (_Forward, type(None))
        return [module] if from_torch and unpatched and not compat.is_compiled(module) else []
    if compat.is_compiled(module):
        return []
    return [layer for part in compat.parts(module) for layer in _linears(part)]
