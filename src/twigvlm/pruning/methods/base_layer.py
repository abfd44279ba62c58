"""Attention of a base layer: FastV's ranking at layer K, and the upper bound of the paper's §3.2 at a deep layer."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from twigvlm.base.layers import project_keys
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods.twig_attention import Queries, layer_scores
from twigvlm.pruning.view import TrunkOutput


@dataclass(frozen=True)
class BaseLayerAttention:
    """Scores by the attention of base layer `layer`, or of layers `layer` to `through`, on the whole unpruned prompt.

    Of several layers it is the mean of their shares, which a P-Head can learn (`teacher_layers`). A layer beyond K + 1 costs a
    pass through all layers before it: an oracle to measure by, not a way to save time.
    """

    layer: int
    """The layer, or the first of several, counted from 1 as in the paper."""
    queries: Queries = "last"
    """Whose attention is summed."""
    through: int | None = None
    """Last layer; None: there is one."""

    def __call__(self, trunk: TrunkOutput) -> Float[Tensor, "batch tokens"]:
        """Scores in float32; 0 at text tokens.

        Raises:
            TwigVLMError: the base has no such layers.
        """
        base, done = trunk.base, trunk.twig.config.trunk_layers
        first, last = self.layer - 1, (self.through or self.layer) - 1
        if not 0 <= first <= last < base.num_layers:
            named = self.layer if self.through is None else f"{self.layer}-{self.through}"
            raise TwigVLMError(f"layer={named}: must be 1 to {base.num_layers}, the layers of this base")
        inputs = trunk.tokens.inputs
        start, hidden = (done, trunk.tokens.hidden) if first >= done else (0, trunk.prompt.hidden)
        scores: list[Tensor] = []
        for index in range(first, last + 1):
            hidden = base.run_layers(hidden, start, index, inputs, trunk.masks)
            layer = base.layers[index]
            keys = project_keys(layer, hidden, inputs)
            scores.append(layer_scores(layer, hidden, keys, trunk.tokens, self.queries))
            start = index
        if len(scores) == 1:
            return scores[0]
        return torch.stack([F.normalize(of_layer, p=1.0, dim=1) for of_layer in scores]).mean(dim=0)
