"""P-Head: gates on the queries and keys of the last twig layer, by which visual tokens are ranked (Eq. 7)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_OPEN = 1.2785  # g(1.2785) = 1
_SPREAD = 1.0  # of the random part: so much that some gates are open to tokens that lack the common direction


class PruningHead(nn.Module):
    """Two linear maps without bias, W_gq and W_gk, and the gate g(z) = relu(z)·sigmoid(z) (Eq. 7).

    A zero map would stay zero, because g and its slope vanish there. So the maps start at random: each gate is open to a part
    of the tokens, and every row learns from the first step. `open` gives them a better start.

    Args:
        width: width of the layer's input.
        gates: H·d_h, number of the layer's heads times their size.
    """

    def __init__(self, width: int, gates: int) -> None:
        super().__init__()
        self.query_gate = nn.Linear(width, gates, bias=False)
        self.key_gate = nn.Linear(width, gates, bias=False)
        for linear in (self.query_gate, self.key_gate):
            nn.init.normal_(linear.weight, std=width**-0.5)

    @torch.no_grad()
    def open(self, inputs: Float[Tensor, "tokens width"]) -> None:
        """Open most gates to tokens like these, so that a fresh head ranks much as the attention that it gates.

        Normed inputs of a language model share a strong common direction. A map that reads off how far a token goes in that
        direction, scaled so that g is 1 on average, has nearly the same value for all tokens.

        Args:
            inputs: normed inputs of the self-attention at some tokens.
        """
        inputs = inputs.float()
        size = inputs.square().mean().sqrt()
        direction = F.normalize(inputs.mean(dim=0), dim=0)
        length = (inputs @ direction).square().mean().sqrt()
        for linear in (self.query_gate, self.key_gate):
            linear.weight.mul_(_SPREAD / size).add_((_OPEN / length * direction).to(linear.weight))

    def gate_queries(
        self, inputs: Float[Tensor, "batch queries width"], queries: Float[Tensor, "batch heads queries head_dim"]
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """g(W_gq x) ⊙ q̃ of some tokens.

        Args:
            inputs: normed inputs of the self-attention at the queries.
            queries: rotated queries.
        """
        return _gate(self.query_gate(inputs)).unflatten(-1, (-1, queries.shape[3])).transpose(1, 2) * queries

    def gate_keys(
        self, inputs: Float[Tensor, "batch visual width"], keys: Float[Tensor, "batch kv_heads visual head_dim"]
    ) -> Float[Tensor, "batch heads visual head_dim"]:
        """g(W_gk X) ⊙ K̃ of visual tokens, in all H heads: keys of grouped-query attention are repeated.

        Args:
            inputs: normed inputs of the self-attention at the visual tokens.
            keys: rotated keys of the visual tokens.
        """
        gates = _gate(self.key_gate(inputs)).unflatten(-1, (-1, keys.shape[3])).transpose(1, 2)
        return gates * keys.repeat_interleave(gates.shape[1] // keys.shape[1], dim=1)


def _gate(inputs: Tensor) -> Tensor:
    return inputs.relu() * torch.sigmoid(inputs)
