"""Per-token inputs of a decoder layer beside the states: rotary embedding, position, features that enter later layers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class TokenInputs(NamedTuple):
    """What layers need of each token beside its state; tensors are [batch, tokens, …]."""

    cos: Tensor
    """Cosines at the token's position, [batch, tokens, rotary_dim]; those of several kinds of layers come one after another."""
    sin: Tensor
    kinds: tuple[str, ...] = ()
    """Types of layers with rotary embeddings of their own, in the order of `cos`; empty: all layers share one."""
    positions: Tensor | None = None
    """Index of the token in the unpruned sequence, [batch, tokens], where layers have a sliding window."""
    attends_until: Tensor | None = None
    """Index of the last token that this one may attend to, [batch, tokens] (bidirectional image attention)."""
    deepstack: tuple[Tensor, ...] = ()
    """Entry i is added to the states after layer i, [batch, tokens, width]: 0 at text tokens."""

    def rotary(self, kind: str | None) -> tuple[Tensor, Tensor]:
        """(cos, sin) for a layer of this type."""
        if not self.kinds:
            return self.cos, self.sin
        which = self.kinds.index(str(kind))
        return self.cos.chunk(len(self.kinds), -1)[which], self.sin.chunk(len(self.kinds), -1)[which]


def select_tokens(inputs: TokenInputs, indices: Int[Tensor, "batch kept"]) -> TokenInputs:
    """The tokens at `indices`, with the positions they had."""

    def pick(part: Tensor) -> Tensor:
        return torch.take_along_dim(part, indices if part.ndim == 2 else indices.unsqueeze(-1), dim=1)

    return _each(inputs, pick)


def slice_tokens(inputs: TokenInputs, start: int, stop: int) -> TokenInputs:
    """Tokens start..stop-1, as views."""
    return _each(inputs, lambda part: part[:, start:stop])


def select_rows(inputs: TokenInputs, rows: Int[Tensor, " rows"]) -> TokenInputs:
    """Some rows of a batch."""
    return _each(inputs, lambda part: part.index_select(0, rows.to(part.device)))


def join_tokens(prompt: TokenInputs, new: TokenInputs, positions: Int[Tensor, "batch new"]) -> TokenInputs:
    """Tokens of a prompt, and new ones after them.

    Args:
        prompt: per-token inputs of the prompt.
        new: inputs of the new tokens, whose rotary embeddings count.
        positions: positions of the new tokens in the unpruned sequence.
    """

    def after(old: Tensor | None, more: Tensor) -> Tensor | None:
        return None if old is None else torch.cat((old, more.to(old)), dim=1)

    features = (torch.nn.functional.pad(part, (0, 0, 0, positions.shape[1])) for part in prompt.deepstack)
    return TokenInputs(
        torch.cat((prompt.cos, new.cos), dim=1),
        torch.cat((prompt.sin, new.sin), dim=1),
        prompt.kinds,
        after(prompt.positions, positions),
        after(prompt.attends_until, positions),
        tuple(features),
    )


def _each(inputs: TokenInputs, change: Callable[[Tensor], Tensor]) -> TokenInputs:
    return TokenInputs(
        change(inputs.cos),
        change(inputs.sin),
        inputs.kinds,
        None if inputs.positions is None else change(inputs.positions),
        None if inputs.attends_until is None else change(inputs.attends_until),
        tuple(change(features) for features in inputs.deepstack),
    )


def rotate(
    states: Float[Tensor, "batch heads tokens head_dim"],
    cos: Float[Tensor, "#batch tokens rotary_dim"],
    sin: Float[Tensor, "#batch tokens rotary_dim"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Rotate queries or keys (RoFormer's rotation, halves convention: component i is paired with i + rotary_dim/2).

    Components beyond rotary_dim (partial rotary) stay as they are.
    """
    width = cos.shape[-1]
    half = width // 2
    turned, rest = states[..., :width], states[..., width:]
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = turned * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
