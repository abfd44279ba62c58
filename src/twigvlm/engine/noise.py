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
        temperature: temperature of the sampling, by which the twig drafts.
        vocabulary: size of the base's vocabulary.
        device: device of its logits.
        generator: what is drawn from; None: torch's global generator.
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
        """Noise of the `position`-th new token (from 0).

        Raises:
            KeyError: `forget` has released this position.
        """
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
        """Release the noise of the tokens before this one, which are chosen."""
        for old in [old for old in self._drawn if old < position]:
            del self._drawn[old]
            self._states.pop(old, None)

    def close(self, count: int) -> None:
        """End the answer after that many tokens: rewind the generator past noise drawn for rejected drafts.

        It is not rewound if somebody else, such as another thread, has drawn from it since, who would get the same numbers again.
        """
        if self._generator is None or self._last is None or count >= self._next:
            return
        if torch.equal(self._generator.get_state(), self._last):
            self._generator.set_state(self._states[count])


def _default_generator(device: torch.device) -> torch.Generator | None:
    """Torch's global generator for a device; None for devices where it cannot be accessed."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return None
