"""Faster linear layers against torch's own, and that nothing else notices them."""

from contextlib import nullcontext
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from twigvlm import compat
from twigvlm.base import cpu_linear as module
from twigvlm.base.cpu_linear import MAX_TOKENS, alone_in_process, cpu_linear, linear


@pytest.fixture(params=[False, True], ids=["any processor", "Intel"], autouse=True)
def processor(request, monkeypatch):
    monkeypatch.setattr(module, "HAS_SMALL_PRODUCTS", request.param)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    bias=st.booleans(),
)
@torch.no_grad()
def test_a_linear_layer_computes_the_same(shape, width, out, bias):
    layer, states = nn.Linear(width, out, bias), torch.randn(*shape, width)
    expected = layer(states)
    with cpu_linear(layer, states):
        got = layer(states)
    for states_after in (got, linear(states, layer.weight, layer.bias)):
        assert states_after.is_contiguous()
        torch.testing.assert_close(states_after, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(MAX_TOKENS + 1, torch.float32), (0, torch.float32), (3, torch.bfloat16), (3, torch.float64)],
    ids=str,
)
def test_other_passes_are_torchs_own(tokens, dtype):
    layer, states = nn.Linear(33, 17).to(dtype), torch.randn(1, tokens, 33, dtype=dtype)
    expected = layer(states)
    with cpu_linear(layer, states):
        assert torch.equal(layer(states), expected)
    assert torch.equal(linear(states, layer.weight, layer.bias), expected)


@pytest.fixture
def alone():
    alone_in_process()
    yield
    alone_in_process(False)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 33), (33,)])
def test_one_token_in_bfloat16(alone, shape, bias):
    layer, states = nn.Linear(33, 17, bias).bfloat16(), torch.randn(shape).bfloat16()
    expected = layer.float()(states.float())
    layer.bfloat16()
    with cpu_linear(layer, states):
        got = layer(states)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02)
    assert torch.equal(linear(states, layer.weight, layer.bias), got)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2])
def test_only_who_is_alone_in_the_process_switches_onednn_off(monkeypatch, tokens):
    seen = []
    monkeypatch.setattr(compat, "without_onednn", lambda: seen.append("off") or nullcontext())
    layer, states = nn.Linear(33, 17).bfloat16(), torch.randn(1, tokens, 33).bfloat16()
    linear(states, layer.weight, layer.bias)
    assert not seen
    alone_in_process()
    try:
        linear(states, layer.weight, layer.bias)
    finally:
        alone_in_process(False)
    assert seen == ["off"] * (tokens == 1)


def test_gradients_are_torchs_own():
    layer, states = nn.Linear(33, 17), torch.randn(1, 3, 33)
    with cpu_linear(layer, states):
        got = layer(states)
    assert torch.equal(got, layer(states))
    got.sum().backward()
    assert layer.weight.grad is not None


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input):
        return 2 * F.linear(input, self.weight, self.bias)


@torch.no_grad()
def test_layers_with_a_forward_of_their_own_keep_it():
    parts = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8))
    parts[1].forward = lambda states: states + 1  # a user's patch
    states = torch.randn(1, 2, 8)
    expected = parts(states)
    with cpu_linear(parts, states):
        assert torch.equal(parts(states), expected)
    assert torch.equal(parts[1](states), states + 1)


class Failing(nn.Module):
    def forward(self, states):
        raise RuntimeError("broken")


@torch.no_grad()
def test_after_a_pass_the_layers_are_as_before():
    parts = nn.Sequential(nn.Linear(33, 17), Failing())
    states, before = torch.randn(1, 3, 33), dict(vars(parts[0]))
    expected = parts[0](states)
    with pytest.raises(RuntimeError, match="broken"), cpu_linear(parts, states), cpu_linear(parts, states):
        parts(states)
    assert vars(parts[0]).keys() == before.keys()
    assert torch.equal(parts[0](states), expected)


@torch.no_grad()
def test_other_threads_keep_torchs_own():
    """Bit for bit, while this one is in the middle of a pass."""
    layer, states = nn.Linear(300, 200), torch.randn(1, 3, 300)
    expected, got = layer(states), []

    @torch.no_grad()
    def run():
        got.append(layer(states))

    with cpu_linear(layer, states):
        thread = Thread(target=run)
        thread.start()
        thread.join()
    assert torch.equal(got[0], expected)
