"""Devices that do not exist, for tests of where tensors lie: their tensors compute on the CPU, and refuse to be mixed.

As on real devices, an operation takes tensors of one device, and beside them indices and single numbers of the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FIRST, SECOND = "lazy:0", "lazy:1"  # names that torch knows on every machine
CPU = torch.device("cpu")
aten = torch.ops.aten


class Placed(torch.Tensor):
    """A tensor of the CPU that says it lies elsewhere."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "Placed":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: torch.Tensor, device: torch.device) -> None:
        self._real = inner

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})

    def tolist(self) -> list[Any]:
        return self._real.tolist()


@contextmanager
def devices() -> Iterator[None]:
    """Within this context `FIRST` and `SECOND` are devices."""
    with ExitStack() as stack:
        stack.enter_context(_Operations())
        stack.enter_context(_Lists())
        # tensor subclasses make no views in inference mode
        stack.enter_context(patch.object(torch, "inference_mode", torch.no_grad))
        yield


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Tensors from lists of numbers, which torch makes without asking a dispatch mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor:
            place = kwargs.pop("device", None)
            return function(_map(lambda tensor: tensor.tolist(), args[0]), *args[1:], **kwargs).to(place)
        if function is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        return function(*args, **kwargs)


def _compute(operation: Any, args: Any, kwargs: Any) -> Any:
    tensors: list[torch.Tensor] = []
    _map(tensors.append, (args, kwargs))
    places = {tensor.device for tensor in tensors if tensor.ndim or tensor.device != CPU}
    if operation in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        places -= {CPU} if args[0].device != CPU else set()
    if len(places) > 1 and operation not in (aten._to_copy.default, aten.copy_.default):
        raise RuntimeError(f"{operation}: tensors on {', '.join(sorted(map(str, places)))}")
    first = args[0].device if tensors and isinstance(args[0], torch.Tensor) and args[0].ndim else CPU
    place = torch.device(kwargs.get("device") or (first if first in places else next(iter(places), first)))
    if operation is aten._fused_sdp_choice.default:
        return 0  # the kernel in plain operations
    args, kwargs = _map(lambda tensor: getattr(tensor, "_real", tensor), (args, kwargs))
    result = operation(*args, **{**kwargs, "device": CPU} if kwargs.get("device") is not None else kwargs)
    same = {
        id(getattr(tensor, "_real", tensor)): tensor for tensor in tensors
    }  # operations in place return an argument

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in same:
            return same[id(tensor)]
        return tensor if place == CPU else Placed(tensor, place)

    return _map(placed, result)


def _map(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Arguments or results of an operation, with their tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map(change, one) for name, one in value.items()}
    return type(value)(_map(change, one) for one in value) if isinstance(value, list | tuple) else value
