"""Sampling noise: one exponential variable for each token of the vocabulary and each position of an answer.

Sampling is greedy on scores that carry noise: the largest p(x) / e(x), where each e(x) is an exponential variable, is a draw
from p (the Gumbel-max trick; torch.multinomial and so Hugging Face's `generate` draw in this very way). The noise belongs to
a position in the answer, not to a draft: the base chooses with it whatever was drafted, so speculation changes no token of a
seed, let alone their distribution. The twig drafts with the same noise, and so draws what the base is about to draw wherever
their distributions agree; siblings in a tree are a draw without replacement.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class Noise:
    """Exponential noise for each position of one answer, drawn once, in the order of positions.

    Args:
        temperature: of the sampling; the twig drafts by it.
        vocabulary: size of the base's.
        device: of its logits.
        generator: None: torch's own.
    """

    def __init__(
        self, temperature: float, vocabulary: int, device: torch.device, generator: torch.Generator | None
    ) -> None:
        self.temperature = temperature
        self._like = torch.empty(vocabulary, device=device)
        self._generator = _default_generator(device) if generator is None else generator
        self._drawn: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        self._last: Tensor | None = None  # the generator's state after its newest noise
        self._next = 0

    def at(self, position: int) -> Float[Tensor, " vocabulary"]:
        """Noise of the `position`-th new token (from 0). Positions already released by `forget` are unavailable."""
        draws = self._next <= position
        while self._next <= position:
            if self._generator is not None:
                self._states[self._next] = self._generator.get_state()
            self._drawn[self._next] = torch.empty_like(self._like).exponential_(1, generator=self._generator)
            self._next += 1
        if draws and self._generator is not None:
            self._last = self._generator.get_state()
        return self._drawn[position]

    def draws_from(self, generator: torch.Generator) -> bool:
        """Whether this is its generator."""
        return self._generator is generator

    def forget(self, position: int) -> None:
        """The tokens before this one are chosen."""
        for old in [old for old in self._drawn if old < position]:
            del self._drawn[old]
            self._states.pop(old, None)

    def close(self, count: int) -> None:
        """The answer ended after that many tokens: rewind the generator past noise drawn for rejected drafts.

        Not where somebody else, such as another thread, has drawn from it since, who would be given the same numbers again.
        """
        if self._generator is None or self._last is None or count >= self._next:
            return
        if torch.equal(self._generator.get_state(), self._last):
            self._generator.set_state(self._states[count])


def _default_generator(device: torch.device) -> torch.Generator | None:
    """Torch's own generator for a device; None for devices without a default generator that can be had."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return None
