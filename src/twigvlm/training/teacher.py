"""The teacher of both stages: the frozen, unpruned base, run once from the trunk that it shares with the student."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods.pruning_head import VisualQuery, log_visual_attention


@dataclass(frozen=True)
class TeacherOutput:
    """What the student is held to; None where it was not asked for."""

    attention: Float[Tensor, "batch queries visual"] | None
    """Logarithm of a_b: attention of the teacher's layers restricted to visual tokens, averaged over them."""
    logits: Float[Tensor, "answers vocabulary"] | None
    """Of the tokens before each answer token."""


def resolve_teacher_layers(given: Sequence[int] | None, layers: int, trunk: int) -> tuple[int, ...]:
    """The teacher's layers, from 1, ascending: the given ones, or the one at 5/8 of all layers, rounded.

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
    base: BaseVLM,
    hidden: Float[Tensor, "batch tokens width"],
    trunk: int,
    inputs: TokenInputs,
    masks: Masks,
    query: VisualQuery | None = None,
    layers: Sequence[int] = (),
    answers: Bool[Tensor, "batch positions"] | None = None,
) -> TeacherOutput:
    """Run the base on a whole batch, no further than what is asked for.

    Args:
        base: the base.
        hidden: states after layer K.
        trunk: K.
        inputs: inputs of all tokens.
        masks: masks of the batch.
        query: whose attention to which visual tokens is asked for; None: nobody's.
        layers: whose attention is averaged, from 1, ascending, above K.
        answers: positions whose logits are asked for, of all but the last; None: none.
    """
    attention: Tensor | None = None
    logits: Tensor | None = None
    if query is not None:
        of_layers: list[Tensor] = []
        for layer in layers:
            hidden = base.run_layers(hidden, trunk, layer - 1, inputs, masks)
            of_layers.append(log_visual_attention(base.layers[layer - 1], hidden, inputs, query))
            trunk = layer - 1
        attention = torch.logsumexp(torch.stack(of_layers), dim=0) - math.log(len(of_layers))
    if answers is not None:
        hidden = base.run_layers(hidden, trunk, base.num_layers, inputs, masks)
        logits = base.logits(hidden[:, :-1][answers])
    return TeacherOutput(attention, logits)
