"""P-Head: gates on the queries and keys of the last twig layer, by which visual tokens are ranked (Eq. 7)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PruningHead(nn.Module):
    """Two linear maps without bias, and the gate g(z) = relu(z)·sigmoid(z).

    The maps start at random. At zero they would stay there, because g and its slope vanish at zero; and one sign for all would shut a
    gate for good. At random, every gate is open for a part of the tokens, so that every row of a map learns from the first step.

    Args:
        width: of the layer's input.
        gates: H·d_h, heads times their size.
    """

    def __init__(self, width: int, gates: int) -> None:
        super().__init__()
        self.query_gate = nn.Linear(width, gates, bias=False)
        self.key_gate = nn.Linear(width, gates, bias=False)
        for linear in (self.query_gate, self.key_gate):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(
        self,
        query_inputs: Float[Tensor, "batch queries width"],
        key_inputs: Float[Tensor, "batch visual width"],
        queries: Float[Tensor, "batch heads queries head_dim"],
        keys: Float[Tensor, "batch kv_heads visual head_dim"],
    ) -> tuple[Float[Tensor, "batch heads queries head_dim"], Float[Tensor, "batch heads visual head_dim"]]:
        """Gated queries and keys; keys are repeated to H heads.

        Args:
            query_inputs: normed inputs of the self-attention at the queries.
            key_inputs: the same at the visual tokens.
            queries: rotated queries.
            keys: rotated keys of the visual tokens.
        """
        heads, head_dim = queries.shape[1], queries.shape[3]
        keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
        query_gates = _gate(self.query_gate(query_inputs)).unflatten(-1, (heads, head_dim)).transpose(1, 2)
        key_gates = _gate(self.key_gate(key_inputs)).unflatten(-1, (heads, head_dim)).transpose(1, 2)
        return query_gates * queries, key_gates * keys


def _gate(inputs: Tensor) -> Tensor:
    return inputs.relu() * torch.sigmoid(inputs)
