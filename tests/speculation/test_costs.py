"""Calibrated costs, by a clock that advances with the work: each layer takes as long as it has tokens."""

import time
from itertools import count

import pytest

from tests.tiny import tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.speculation.costs import NODES, PROMPT, StepCosts, calibrate

LAYERS, TRUNK, TWIG = 6, 1, 2


@pytest.fixture
def model():
    return TwigVLM.grow(tiny_llava(layers=LAYERS, context=PROMPT), TwigConfig(TRUNK, TWIG))


def calibrated(model, monkeypatch, seconds):
    """Costs where a layer takes `seconds(tokens)`."""
    now = 0.0

    def work(layer, inputs):
        nonlocal now
        now += seconds(inputs[0].shape[1])

    for layer in (*model.base.layers, *model.twig.layers):
        layer.register_forward_pre_hook(work)
    with monkeypatch.context() as patch:
        patch.setattr(time, "thread_time", lambda: now)
        return calibrate(model.base, model.twig, repeats=1)


def test_passes_cost_what_their_layers_cost(model, monkeypatch):
    """The sizes between those that are timed lie on lines between them."""
    costs = calibrated(model, monkeypatch, float)
    assert costs.max_nodes == NODES[-1]
    sizes = range(costs.max_nodes + 1)
    assert costs.trunk == pytest.approx([TRUNK * n for n in sizes])
    assert costs.draft == pytest.approx([(TRUNK + TWIG) * n for n in sizes])
    assert costs.verify == pytest.approx([(LAYERS - TRUNK) * n for n in sizes])
    assert costs.fill == pytest.approx(TWIG - 1)  # a token that enters the twig does not run through its last layer


def test_a_slow_timing_does_not_make_larger_passes_look_expensive(model, monkeypatch):
    costs = calibrated(model, monkeypatch, lambda tokens: 100.0 if tokens == 2 else float(tokens))
    assert costs.trunk[:6] == pytest.approx((0, 1, 3, 3, 4, 5))


def test_the_time_of_other_processes_does_not_count(model, monkeypatch):
    wall = count(step=1000)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(wall)))
    costs = calibrated(model, monkeypatch, float)
    assert costs.verify == pytest.approx([(LAYERS - TRUNK) * n for n in range(costs.max_nodes + 1)])


def test_on_a_busy_machine_it_ends_after_fewer_rounds(model, monkeypatch):
    hours = count(step=3600)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(hours)))
    passes = []
    model.base.layers[-1].register_forward_pre_hook(lambda layer, inputs: passes.append(inputs[0].shape[1]))
    calibrate(model.base, model.twig, repeats=50)
    assert passes.count(1) == 2  # to warm up, and timed


def test_costs_are_measured_once(model):
    assert model.costs() is model.costs()


def test_a_pass_of_several_rows_costs_what_its_nodes_cost():
    costs = StepCosts((0.0, 1.0, 2.0), (0.0, 2.0, 4.0), (0.0, 3.0, 5.0), 0.5)
    assert costs.of_rows(1) == costs
    assert costs.of_rows(3).verify == (0.0, 5.0 * 3 / 2, 5.0 * 6 / 2)  # beyond what was measured: in proportion
