"""Attention of a base layer: FastV's rule at layer K; at a deep layer, the upper bound of the paper's §3.2."""

from dataclasses import dataclass

from torch import Tensor

from twigvlm.base.layers import project_keys_values
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods.twig_attention import Queries, layer_scores
from twigvlm.pruning.view import TrunkOutput


@dataclass(frozen=True)
class BaseLayerAttention:
    """Scores by the attention of base layer `layer`, on the whole unpruned prompt.

    A layer beyond K + 1 costs a pass through all layers before it: an oracle to measure by, not a way to save time.
    """

    layer: int
    """Counted from 1, as in the paper."""
    queries: Queries = "last"

    def __call__(self, trunk: TrunkOutput) -> Tensor:
        """Scores [batch, tokens]."""
        base, done = trunk.base, trunk.twig.config.trunk_layers
        index = self.layer - 1
        if not 0 <= index < base.num_layers:
            raise TwigVLMError(f"layer={self.layer}: must be 1 to {base.num_layers}, the layers of this base")
        inputs = trunk.tokens.inputs
        start, hidden = (done, trunk.tokens.hidden) if index >= done else (0, trunk.prompt.hidden)
        hidden = base.run_layers(hidden, start, index, inputs, trunk.masks)
        keys, _ = project_keys_values(base.layers[index], hidden, inputs)
        return layer_scores(base.layers[index], hidden, keys, trunk.tokens, self.queries)
