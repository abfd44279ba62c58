"""Drafted tokens of one step as tensors over all rows (Algorithms 1 and 2); a chain is a tree without branches."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

INVALID = -1
"""Stands for no node where rows have different numbers of them."""


class Nodes(NamedTuple):
    """The drafted tokens of one step. Node 0 of each row is the root, its last accepted token; parents precede children.

    Rows of fewer nodes are filled up with nodes of score -inf, which nothing accepts.
    """

    tokens: Int[Tensor, "rows nodes"]
    parents: Int[Tensor, "rows nodes"]
    """Index of each node's parent; the root is its own."""
    depths: Int[Tensor, "rows nodes"]
    """Steps from the root."""
    scores: Float[Tensor, "rows nodes"]
    """Cumulative log-probability of the path from the root."""

    @classmethod
    def rooted(cls, tokens: Int[Tensor, " rows"]) -> "Nodes":
        """The roots alone."""
        zeros = torch.zeros_like(tokens)[:, None]
        return cls(tokens[:, None], zeros, zeros, zeros.float())

    @property
    def valid(self) -> Bool[Tensor, "rows nodes"]:
        """True at nodes that were drafted, the root included."""
        return self.scores.isfinite()

    def without(self, some: Bool[Tensor, "rows nodes"]) -> "Nodes":
        """The same nodes, of which some, and so their descendants, can no longer be accepted."""
        return self._replace(scores=self.scores.masked_fill(some, float("-inf")))

    def add(
        self,
        parents: Int[Tensor, "rows expanded"],
        tokens: Int[Tensor, "rows expanded width"],
        log_probabilities: Float[Tensor, "rows expanded width"],
    ) -> "Nodes":
        """Add children to nodes, with their probabilities given the paths to their parents; INVALID parents get none."""
        width = tokens.shape[2]
        known = parents.clamp(min=0)
        scores = log_probabilities + self.scores.gather(1, known)[..., None]
        scores = scores.masked_fill((parents == INVALID)[..., None], float("-inf"))
        return Nodes(
            torch.cat((self.tokens, tokens.flatten(1)), dim=1),
            torch.cat((self.parents, known.repeat_interleave(width, dim=1)), dim=1),
            torch.cat((self.depths, (self.depths.gather(1, known) + 1).repeat_interleave(width, dim=1)), dim=1),
            torch.cat((self.scores, scores.flatten(1)), dim=1),
        )

    def take(self, chosen: Int[Tensor, "rows chosen"]) -> "Nodes":
        """These nodes, renumbered: the root first, each after its parent, INVALID ones last."""
        count = self.tokens.shape[1]
        known = chosen.clamp(min=0)
        index = torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
        # One more column, so that INVALID ones overwrite no node's number.
        numbers = torch.zeros(len(chosen), count + 1, dtype=torch.long, device=chosen.device)
        numbers.scatter_(1, chosen.masked_fill(chosen == INVALID, count), index)
        return Nodes(
            self.tokens.gather(1, known),
            numbers.gather(1, self.parents.gather(1, known)),
            self.depths.gather(1, known),
            self.scores.gather(1, known).masked_fill(chosen == INVALID, float("-inf")),
        )


def most_probable(nodes: Nodes, among: Bool[Tensor, "rows nodes"], count: int) -> Int[Tensor, "rows chosen"]:
    """The `count` nodes with the highest cumulative path probability among some, ascending; of equals the first ones.

    A path's probability never rises, so that among all nodes the ancestors of a chosen node are chosen too. Rows with fewer
    nodes are filled up with INVALID at the end.
    """
    scores = nodes.scores.masked_fill(~among, float("-inf"))
    best = scores.sort(dim=1, descending=True, stable=True)
    chosen, kept = best.indices[:, :count], best.values[:, :count].isfinite()
    beyond = scores.shape[1]
    chosen = chosen.masked_fill(~kept, beyond).sort(dim=1).values
    return chosen.masked_fill(chosen == beyond, INVALID)


def ancestor_mask(
    parents: Int[Tensor, "rows nodes"],
    queries: Int[Tensor, "rows queries"],
    keys: Int[Tensor, "rows keys"],
    depth: int,
) -> Bool[Tensor, "rows queries keys"]:
    """Which nodes each queried node may see: its ancestors and itself, the root included. INVALID sees and is seen by none.

    Args:
        parents: parents of all nodes.
        queries: nodes that ask.
        keys: nodes that may be seen.
        depth: of the deepest node.
    """
    node = queries.masked_fill(queries == INVALID, -2)
    seen = keys[:, None, :] == node[:, :, None]
    for _ in range(depth):
        node = parents.gather(1, node.clamp(min=0)).masked_fill(node < 0, -2)
        seen = seen | (keys[:, None, :] == node[:, :, None])
    return seen
