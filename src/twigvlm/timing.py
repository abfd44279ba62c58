"""Wall-clock times of a request."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Timings:
    """Wall-clock seconds of one request."""

    prefill: float = 0.0
    """Vision, prompt, pruning, and the choice of the first token."""
    draft: float = 0.0
    """Layers of trunk and twig; without speculation, of the trunk only."""
    verify: float = 0.0
    """Layers K+1..L, the head, and the choice of tokens."""
    total: float = 0.0
    """The whole request."""

    @property
    def decode(self) -> float:
        """Everything after the first token."""
        return self.total - self.prefill


def clock_of(device: torch.device) -> Callable[[], float]:
    """A function that waits for the device to finish its work and returns the time in seconds."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
