"""Engines whose passes have static shapes, as on an accelerator, or exact ones, as on a CPU."""

from twigvlm.config import SpeculationConfig
from twigvlm.engine.engine import Engine
from twigvlm.engine.runner import Runner
from twigvlm.speculation.costs import StepCosts


def make_runner(model, static, speculate="none", costs=None, **options):
    """A runner of a TwigVLM.

    Args:
        model: the TwigVLM.
        static: whether shapes do not depend on what was drafted.
        speculate: how to draft.
        costs: of `auto`.
        options: δ, θ, D, E, K_sel and N_max.
    """
    assert (speculate == "auto") == isinstance(costs, StepCosts)
    return Runner(model.base, model.twig, SpeculationConfig(speculate, **options), costs, 32, static)


def engine_on(model, runner):
    """An engine that takes what `TwigVLM.generate` takes."""
    return Engine(runner, model.engine().make_row)
