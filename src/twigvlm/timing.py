"""Wall-clock times of a request."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Timings:
    """Wall-clock seconds of one request."""

    prefill: float = 0.0
    """Vision, prompt, pruning, and the first token."""
    draft: float = 0.0
    """Trunk and twig; without speculation only the trunk."""
    verify: float = 0.0
    """Layers K+1..L, the head, and the choice of tokens."""
    total: float = 0.0

    @property
    def decode(self) -> float:
        """Everything after the first token."""
        return self.total - self.prefill


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that waits for the device's work."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised
