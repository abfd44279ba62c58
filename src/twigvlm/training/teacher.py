"""The teacher of both stages: the frozen, unpruned base, run once from the trunk that it shares with the student."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods.pruning_head import VisualQuery, log_visual_attention
from twigvlm.training.trunk import TrunkBatch


@dataclass(frozen=True)
class TeacherOutput:
    """What the student is held to; None where it was not asked for."""

    attention: Float[Tensor, "batch queries visual"] | None
    """Logarithm of a_b (Eq. 11): attention restricted to visual tokens, averaged over those of the teacher's layers that see
    one; -inf where none does."""
    logits: Float[Tensor, "answers vocabulary"] | None
    """Of the tokens before each answer token."""


def resolve_teacher_layers(given: Sequence[int] | None, layers: int, trunk: int) -> tuple[int, ...]:
    """The teacher's layers, from 1, ascending: the given ones, or the one at 5/8 of all layers, rounded.

    Args:
        given: layers, from 1; None: layer 20 of 32, as in the authors' code, or what comes closest to it.
        layers: L.
        trunk: K.

    Raises:
        TwigVLMError: one of them is not in K+1..L.
    """
    if given is None:
        return (max(trunk + 1, round(layers * 5 / 8)),)
    for layer in given:
        if not trunk < layer <= layers:
            raise TwigVLMError(
                f"teacher_layers={layer}: must be {trunk + 1} to {layers}, the layers of this base above the trunk"
            )
    return tuple(sorted(given))


@torch.no_grad()
def run_teacher(
    batch: TrunkBatch,
    query: VisualQuery | None = None,
    layers: Sequence[int] = (),
    answers: Bool[Tensor, "batch positions"] | None = None,
) -> TeacherOutput:
    """Run the base on from a batch after layer K, no further than what is asked for.

    Args:
        batch: after layer K.
        query: whose attention to which visual tokens is asked for; None: nobody's.
        layers: whose attention is averaged, from 1, ascending, above K.
        answers: positions whose logits are asked for, of all but the last; None: none.
    """
    base, hidden, done = batch.base, batch.hidden, batch.layer
    attention: Tensor | None = None
    logits: Tensor | None = None
    if query is not None:
        of_layers: list[Tensor] = []
        for layer in layers:
            hidden = base.run_layers(hidden, done, layer - 1, batch.inputs, batch.masks)
            of_layers.append(log_visual_attention(base.layers[layer - 1], hidden, batch.inputs, query))
            done = layer - 1
        attention = _mean(torch.stack(of_layers))
    if answers is not None:
        hidden = base.run_layers(hidden, done, base.num_layers, batch.inputs, batch.masks)
        logits = base.logits(hidden[:, :-1][answers])
    return TeacherOutput(attention, logits)


def _mean(shares: Float[Tensor, "layers batch queries visual"]) -> Float[Tensor, "batch queries visual"]:
    """Logarithm of the mean distribution; layers whose window holds no visual token of a query have none to add."""
    seeing = (shares > float("-inf")).any(dim=-1, keepdim=True).sum(dim=0)
    return shares.logsumexp(dim=0) - seeing.clamp(min=1).log()
