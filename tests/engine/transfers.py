"""Counts what crosses between host and device: reads of tensors, and tensors made from Python's or numpy's data."""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode, resolve_name

Tensor = torch.Tensor
READS = {
    # of values
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__),
    *(torch.equal, Tensor.equal, torch.allclose, Tensor.allclose, torch.is_nonzero, Tensor.is_nonzero),
    # of sizes that depend on values
    *(torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.bincount, Tensor.bincount),
    *(torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique, torch.Tensor.unique_consecutive),
}
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
REPEATS = {torch.repeat_interleave, Tensor.repeat_interleave}


class Transfers(TorchFunctionMode):
    """Within this context, calls that on an accelerator would wait for the device, or copy data to it.

    It sees what is called in the base's layers too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.tensors = Counter(), Counter()
        self._copies = []  # what is on the host already

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in READS or (function is torch.where and len(args) + len(kwargs) == 1):
            if not any(args[0] is copy for copy in self._copies):
                self.reads[resolve_name(function) or str(function)] += 1
        elif function in FROM_DATA:
            self.data(function.__name__, args[-1] if function is Tensor.new_tensor else args[0])
        elif function in INDEXING:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index):
                self.reads["an index of bools"] += 1
            if any(isinstance(each, list | np.ndarray) for each in index):
                self.tensors["an index"] += 1
        elif function in REPEATS and isinstance(args[-1], Tensor) and "output_size" not in kwargs:
            self.reads["repeat_interleave"] += 1
        result = function(*args, **kwargs)
        if function is Tensor.cpu:
            self._copies.append(result)
        return result

    def data(self, name, data):
        """Note that a tensor was made of something that is none."""
        if not isinstance(data, Tensor):
            self.tensors[name] += 1


@contextmanager
def transfers():
    """Counts within this context."""
    counted, from_numpy = Transfers(), torch.from_numpy

    def counting(array):
        counted.data("from_numpy", array)
        return from_numpy(array)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "from_numpy", counting))  # no mode sees it
        stack.enter_context(counted)
        yield counted
