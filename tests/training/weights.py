"""The weights of a module, to compare them with those of another time or of another module."""

import torch


def copy(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
