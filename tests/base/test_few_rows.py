"""Linear layers of passes over few tokens."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from twigvlm.base.cpu_linear import MOST, cpu_linear


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    bias=st.booleans(),
)
def test_a_linear_layer_computes_the_same(shape, width, out, bias):
    layer, states = nn.Linear(width, out, bias), torch.randn(*shape, width)
    with torch.no_grad(), cpu_linear(states):
        got = layer(states)
    assert got.is_contiguous()
    torch.testing.assert_close(got, layer(states).detach())


@torch.no_grad()
@pytest.mark.parametrize(
    "states",
    [torch.zeros(1, 1, 4), torch.zeros(1, MOST + 1, 4), torch.zeros(1, 2, 4, dtype=torch.bfloat16)],
    ids=["one token", "many tokens", "bfloat16"],
)
def test_other_passes_are_left_alone(states):
    assert isinstance(cpu_linear(states), nullcontext)


def test_where_gradients_are_wanted_nothing_changes():
    assert isinstance(cpu_linear(torch.zeros(1, 2, 4)), nullcontext)


@torch.no_grad()
def test_a_pass_of_few_tokens_puts_the_weight_first():
    states = torch.zeros(1, 2, 4)
    with cpu_linear(states), torch.profiler.profile() as profile:
        nn.Linear(4, 3)(states)
    assert "aten::linear" not in {event.name for event in profile.events()}
