"""What drafts cost on this machine, for a model: measured once, or read from a file."""

from threading import Lock

import torch
from torch import nn

from twigvlm.base.cpu_linear import is_alone
from twigvlm.base.vlm import BaseVLM
from twigvlm.speculation.costs import StepCosts, cached_costs
from twigvlm.twig.block import Twig

_calibrating = Lock()
"""One for all models: calibrations at the same time would disturb each other."""


class Calibrated(nn.Module):
    """A model that knows what the passes of its steps cost."""

    base: BaseVLM
    twig: Twig

    def __init__(self) -> None:
        super().__init__()
        self._costs: dict[tuple[object, ...], StepCosts] = {}

    def calibrate(self) -> StepCosts:
        """Measure the seconds of a step's passes on this machine, replacing earlier measurements; `auto` drafts by them.

        The result is stored in a file for this machine and model, so that no later process measures again. Call it on an
        idle machine, for example once after installation. Without it, the first use of `auto` measures.
        """
        with _calibrating:
            costs = self._costs[self._costs_key()] = cached_costs(self.base, self.twig, refresh=True)
        return costs

    def costs(self) -> StepCosts:
        """Seconds of a step's passes here, as this or another process measured them before, or else measured now."""
        with _calibrating:  # concurrent first calls measure once
            key = self._costs_key()
            if key not in self._costs:
                self._costs[key] = cached_costs(self.base, self.twig)
            return self._costs[key]

    def _costs_key(self) -> tuple[object, ...]:
        # A cheap key: to hash the model, as the name of a file of costs does, takes milliseconds.
        return self.base.dtype, self.base.model.device, self.base.attention, torch.get_num_threads(), is_alone()
