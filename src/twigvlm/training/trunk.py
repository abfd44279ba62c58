"""A batch of samples after layer K, where the student leaves the base and the teacher goes on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.base.vlm import BaseVLM


@dataclass(frozen=True)
class TrunkBatch:
    """A batch padded on the right, after the K layers that base and twig share: without a mask, causal attention hides padding
    from every real token."""

    base: BaseVLM
    layer: int
    """K."""
    hidden: Float[Tensor, "batch tokens width"]
    """States after layer K."""
    inputs: TokenInputs
    """Inputs of all tokens."""
    masks: Masks
    """Masks of the batch."""
    visual_mask: Bool[Tensor, "batch tokens"]
    """True at visual tokens."""


@torch.no_grad()
def run_trunk(base: BaseVLM, layer: int, inputs: Mapping[str, Any]) -> TrunkBatch:
    """Run the base on a batch of samples as far as layer K.

    Args:
        base: the base.
        layer: K.
        inputs: what the base's forward takes, padded on the right.

    Raises:
        TwigVLMError: the base refuses the batch.
    """
    prompt = base.prompt(**{name: value for name, value in inputs.items() if name != "attention_mask"})
    masks, token_inputs = base.masks(), base.token_inputs(prompt)
    hidden = base.run_layers(prompt.hidden, 0, layer, token_inputs, masks)
    return TrunkBatch(base, layer, hidden, token_inputs, masks, prompt.visual_mask)


def autocast(base: BaseVLM) -> torch.autocast:
    """A context in which what is trained, whose weights are float32, computes in the base's number format."""
    return torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32)
