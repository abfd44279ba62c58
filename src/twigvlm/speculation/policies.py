"""Which drafted nodes to expand, and which to have verified: the interface, and Algorithms 1 and 2."""

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.batch import RowState
from twigvlm.speculation.nodes import INVALID, Nodes, most_probable


class DraftPolicy:
    """How the rows of a batch draft; this one drafts nothing, and subclasses override what differs."""

    width: int = 1
    """E: children of each node that is expanded."""
    linear: bool = True
    """Whether drafts are chains, whose causal order needs no mask of their own."""
    depth: int = 0
    """Depth of the deepest node that may be drafted."""
    uses_twig: bool = False
    """Whether the twig drafts, which needs to see prompt and answer."""
    reads_ids: bool = False
    """Whether it drafts from the ids of prompts and answers."""

    def start(self, state: RowState) -> Nodes:
        """Nodes of a step before any pass has run: the roots, and what is drafted without a pass."""
        return Nodes.rooted(state.newest)

    def grows(self, nodes: Nodes) -> Bool[Tensor, "rows nodes"]:
        """Nodes that may get children, as far as the policy is concerned."""
        return nodes.valid

    def expand(
        self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int
    ) -> Int[Tensor, "rows chosen"] | None:
        """Choose the nodes to run through trunk and twig next: ascending indices, padded at the end with INVALID; None: the
        drafts are complete.

        Args:
            nodes: as far as they are drafted.
            expandable: nodes that may get children and have none yet; the others that are chosen get none.
            level: how many passes have run.
        """
        return None

    def select(self, nodes: Nodes) -> Int[Tensor, "rows selected"]:
        """Choose the nodes to verify: ascending indices, padded at the end with INVALID; the root, and each with its parent."""
        index = torch.arange(nodes.tokens.shape[1], device=nodes.tokens.device)
        return torch.where(nodes.valid, index, INVALID)

    def learn(self, accepted: NDArray[np.int64]) -> None:
        """Called after verification with the number of accepted drafted nodes of each row."""

    def join(self, rows: int, deferred_tokens: int) -> None:
        """Rows join after the others. `deferred_tokens`: prompt tokens that the twig has not seen, of a row that joins alone."""

    def leave(self, row: int) -> None:
        """A row leaves, and the last one takes its place."""

    def behind_prompts(self, rows: int) -> "DraftPolicy":
        """The policy for drafts appended to that many prompts during the prefill, where a tree's mask cannot be used."""
        return self


class Chain(DraftPolicy):
    """Algorithm 1: up to δ tokens one after another, ending after a token whose probability is below θ.

    Args:
        options: δ and θ.
        static: whether the shapes of passes do not depend on what was drafted, which saves reads from the device.
    """

    uses_twig = True

    def __init__(self, options: SpeculationConfig, static: bool) -> None:
        self.depth, self.threshold, self.static = options.draft_length, options.draft_threshold, static

    def grows(self, nodes: Nodes) -> Bool[Tensor, "rows nodes"]:
        """The root, and nodes that are likely enough."""
        likely = (nodes.scores - nodes.scores.gather(1, nodes.parents)).exp() >= self.threshold
        return likely & nodes.valid

    def expand(self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int) -> Int[Tensor, "rows 1"] | None:
        """The newest node of every row, until no chain goes on."""
        if level >= self.depth or (not self.static and not bool(expandable[:, -1].any())):
            return None
        return torch.full_like(nodes.tokens[:, :1], nodes.tokens.shape[1] - 1)


class EarlyExit(Chain):
    """Chains as a twig of no layers would draft them: the base's own norm and head on the states after layer K.

    Nothing is trained, and only the trunk runs. LayerSkip drafts so on bases that were trained for it.
    """

    uses_twig = False


class FixedTree(DraftPolicy):
    """Algorithm 2: D levels, of each the K_sel most probable nodes are expanded; the N_max most probable of all are verified.

    Args:
        options: E, K_sel, D and N_max.
        static: whether the shapes of passes do not depend on what was drafted, which saves reads from the device.
    """

    linear, uses_twig = False, True

    def __init__(self, options: SpeculationConfig, static: bool) -> None:
        self.width, self.depth = options.tree_width, options.tree_depth
        self.expanded, self.verified, self.static = options.tree_expand, options.tree_nodes, static

    def behind_prompts(self, rows: int) -> Chain:
        """A chain as long as the tree is deep, which ends below Algorithm 1's published θ."""
        return Chain(SpeculationConfig("chain", draft_length=min(self.depth, self.verified)), self.static)

    def expand(
        self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int
    ) -> Int[Tensor, "rows chosen"] | None:
        """The most probable nodes of the newest level."""
        if level >= self.depth:
            return None
        chosen = most_probable(nodes, expandable & (nodes.depths == level), self.expanded)
        if self.static:
            return chosen
        count = int((chosen != INVALID).sum(dim=1).max())
        return chosen[:, :count] if count else None

    def select(self, nodes: Nodes) -> Int[Tensor, "rows selected"]:
        """The most probable of all, and so all their ancestors."""
        return most_probable(nodes, nodes.valid, 1 + self.verified)
