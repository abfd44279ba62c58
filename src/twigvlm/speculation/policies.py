"""Which drafted nodes to expand, and which to have verified: the interface, and fixed settings."""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.batch import RowState
from twigvlm.speculation.nodes import INVALID, Nodes, most_probable


@runtime_checkable
class Policy(Protocol):
    """How the rows of a batch draft."""

    width: int
    """E: children of each node that is expanded."""
    linear: bool
    """Whether drafts are chains, whose causal order needs no mask of their own."""
    depth: int
    """Of the deepest node that may be drafted."""
    uses_twig: bool
    """Whether the twig drafts, which needs to see prompt and answer."""
    reads_ids: bool
    """Whether it drafts from the ids of prompts and answers."""

    def start(self, state: RowState) -> Nodes:
        """Nodes of a step before any pass has run: the roots, and what is drafted without a pass."""

    def grows(self, nodes: Nodes) -> Bool[Tensor, "rows nodes"]:
        """Nodes that may get children, as far as the policy is concerned."""

    def expand(
        self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int
    ) -> Int[Tensor, "rows chosen"] | None:
        """Nodes to run through trunk and twig next, ascending, INVALID behind; None: the drafts are complete.

        Args:
            nodes: as far as they are drafted.
            expandable: nodes that may get children and have none yet; the others that are chosen get none.
            level: how many passes have run.
        """

    def select(self, nodes: Nodes) -> Int[Tensor, "rows selected"]:
        """Nodes to have verified, ascending: the root, and each with its parent; INVALID behind."""

    def learn(self, accepted: NDArray[np.int64]) -> None:
        """Drafts were verified, and of each row that many drafted nodes were accepted."""

    def join(self, rows: int, deferred_tokens: int) -> None:
        """Rows join behind the others. `deferred_tokens`: prompt tokens that the twig has not seen, of a row that joins alone."""

    def leave(self, row: int) -> None:
        """A row leaves, and the last one takes its place."""


class NoDraft:
    """One token of the base per step."""

    width, linear, depth = 1, True, 0
    uses_twig = reads_ids = False

    def start(self, state: RowState) -> Nodes:
        """The roots."""
        return Nodes.rooted(state.newest)

    def grows(self, nodes: Nodes) -> Bool[Tensor, "rows nodes"]:
        """Every node."""
        return nodes.valid

    def expand(
        self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int
    ) -> Int[Tensor, "rows chosen"] | None:
        """Nothing."""
        return None

    def select(self, nodes: Nodes) -> Int[Tensor, "rows selected"]:
        """Every node."""
        index = torch.arange(nodes.tokens.shape[1], device=nodes.tokens.device)
        return torch.where(nodes.valid, index, INVALID)

    def learn(self, accepted: NDArray[np.int64]) -> None:
        """No-op: nothing was drafted."""

    def join(self, rows: int, deferred_tokens: int) -> None:
        """No-op: no row has settings of its own."""

    def leave(self, row: int) -> None:
        """No-op: no row has settings of its own."""


class Chain(NoDraft):
    """Algorithm 1: up to δ tokens one after another, ending after a token whose probability is below θ.

    Args:
        options: δ and θ.
        stop_early: whether to look, before each pass, if any chain goes on. It saves passes, and costs a device-to-host read.
    """

    uses_twig = True

    def __init__(self, options: SpeculationConfig, stop_early: bool) -> None:
        self.depth, self.threshold, self.stop_early = options.draft_length, options.draft_threshold, stop_early

    def grows(self, nodes: Nodes) -> Bool[Tensor, "rows nodes"]:
        """The root, and nodes that are likely enough."""
        likely = (nodes.scores - nodes.scores.gather(1, nodes.parents)).exp() >= self.threshold
        return likely & nodes.valid

    def expand(self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int) -> Int[Tensor, "rows 1"] | None:
        """The newest node of every row, until no chain goes on."""
        if level >= self.depth or (self.stop_early and not bool(expandable[:, -1].any())):
            return None
        return torch.full_like(nodes.tokens[:, :1], nodes.tokens.shape[1] - 1)


class FixedTree(NoDraft):
    """Algorithm 2: D levels, of each the K_sel most probable nodes are expanded; the N_max most probable of all are verified.

    Args:
        options: E, K_sel, D and N_max.
        stop_early: whether to look, before each pass, how many nodes there are to expand; it costs a device-to-host read.
    """

    linear, uses_twig = False, True

    def __init__(self, options: SpeculationConfig, stop_early: bool) -> None:
        self.width, self.depth = options.tree_width, options.tree_depth
        self.expanded, self.verified, self.stop_early = options.tree_expand, options.tree_nodes, stop_early

    def expand(
        self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int
    ) -> Int[Tensor, "rows chosen"] | None:
        """The most probable nodes of the newest level."""
        if level >= self.depth:
            return None
        chosen = most_probable(nodes, expandable & (nodes.depths == level), self.expanded)
        if not self.stop_early:
            return chosen
        count = int((chosen != INVALID).sum(dim=1).max())
        return chosen[:, :count] if count else None

    def select(self, nodes: Nodes) -> Int[Tensor, "rows selected"]:
        """The most probable of all, and so all their ancestors."""
        return most_probable(nodes, nodes.valid, 1 + self.verified)
