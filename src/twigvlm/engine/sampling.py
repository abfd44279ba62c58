"""The base's choice of a token, greedy or sampled, after whatever logits processors the caller asked for.

Sampling is greedy too, on scores that carry noise: the largest p(x) / e(x), where each e(x) is an exponential variable,
is a draw from p (the Gumbel-max trick; torch.multinomial and so Hugging Face's `generate` draw in this very way). The
noise belongs to a place in the answer, not to a draft: the base chooses with it whatever was drafted, so speculation
changes no token of a seed, let alone their distribution. The twig drafts with the same noise, and so draws what the base
is about to draw wherever their distributions agree; siblings in a tree are a draw without replacement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Processors = Callable[[Tensor, Tensor], Tensor]
"""(ids so far [1, n], float32 scores [1, vocabulary]) -> scores: a LogitsProcessor or a list of them."""

Choose = Callable[[int, Sequence[int]], int]
"""(node, tokens on the path from the root to it, without the root's) -> the base's choice after it."""


class Noise:
    """Exponential noise for each place of one answer, drawn once, in the order of places.

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
        self._generator = _own(device) if generator is None else generator
        self._drawn: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        self._next = 0

    def at(self, place: int) -> Float[Tensor, " vocabulary"]:
        """Of the `place`-th new token (from 0). Ask for none before one that `forget` was told of."""
        while self._next <= place:
            if self._generator is not None:
                self._states[self._next] = self._generator.get_state()
            self._drawn[self._next] = torch.empty_like(self._like).exponential_(1, generator=self._generator)
            self._next += 1
        return self._drawn[place]

    def forget(self, place: int) -> None:
        """The tokens before this one are chosen."""
        for old in [one for one in self._drawn if one < place]:
            del self._drawn[old]
            self._states.pop(old, None)

    def close(self, places: int) -> None:
        """The answer ended after that many tokens: what drafts drew for later ones goes back, as if nobody had drafted."""
        if self._generator is not None and places < self._next:
            self._generator.set_state(self._states[places])


def _own(device: torch.device) -> torch.Generator | None:
    """Torch's own generator for a device; None for kinds of devices that keep theirs to themselves."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return None


@dataclass(frozen=True)
class Sampling:
    """How the base chooses; the same for all tokens of one answer."""

    processors: Processors | None = None
    """Applied to the scores before the choice; None: none."""
    noise: Noise | None = None
    """None: greedy."""

    def choices(
        self, logits: Float[Tensor, "nodes vocabulary"], ids: Int[Tensor, "1 so_far"] | None, place: int
    ) -> Choose:
        """The base's choice after each node of a verified draft.

        Plain greedy choices are made all at once. Otherwise one is made when it is asked for: along the accepted path
        processors see the ids that plain generation would show them, so those with a memory work too.

        Args:
            logits: of each node; node 0 is the last accepted token.
            ids: prompt and accepted tokens; needed with processors.
            place: of the token after node 0 in the answer (from 0).
        """
        if self.processors is None and self.noise is None:
            greedy = logits.argmax(dim=-1).tolist()
            return lambda node, _: int(greedy[node])

        def choose(node: int, drafted: Sequence[int]) -> int:
            scores = logits[node, None].to(torch.float32, copy=True)
            if self.processors is not None:
                assert ids is not None, "processors need the ids"
                scores = self.processors(torch.cat((ids, ids.new_tensor([drafted])), dim=1), scores)
            if self.noise is not None:
                scores = scores.softmax(dim=-1) / self.noise.at(place + len(drafted))
            return int(scores.argmax(dim=-1))

        return choose


def draft_scores(
    logits: Float[Tensor, "nodes draft_vocabulary"],
    places: Sequence[int],
    noise: Noise | None,
    token_ids: Int[Tensor, " draft_vocabulary"] | None,
) -> Float[Tensor, "nodes draft_vocabulary"]:
    """Log-probabilities of the token after each node, of which the best are drafted.

    Args:
        logits: the twig's.
        places: of the token after each node in the answer.
        noise: that the base will choose with; None: greedy.
        token_ids: of the draft vocabulary; None: the whole.
    """
    if noise is not None:
        drawn = torch.stack([noise.at(place) for place in places])
        drawn = drawn if token_ids is None else drawn[:, token_ids]
        logits = logits / noise.temperature - drawn.clamp(min=torch.finfo(drawn.dtype).tiny).log()
    return logits.log_softmax(dim=-1)
