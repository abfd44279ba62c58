"""Which drafted nodes to expand, and which to have verified: by fixed settings, or by what they cost and promise."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.costs import StepCosts
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

    def learn(self, nodes: Nodes, accepted: NDArray[np.int64]) -> None:
        """Drafts were verified, and of each row that many drafted nodes were accepted."""

    def join(self, rows: int, deferred_tokens: int) -> None:
        """Rows join behind the others. `deferred_tokens`: prompt tokens that the twig has not seen, of a row that joins alone."""

    def leave(self, row: int) -> None:
        """A row leaves, and the last one takes its place."""


class NoDraft:
    """One token of the base per step."""

    width, linear, depth = 1, True, 0

    def grows(self, nodes: Nodes) -> Bool[Tensor, "rows nodes"]:
        """Every node."""
        return nodes.valid

    def expand(
        self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int
    ) -> Int[Tensor, "rows chosen"] | None:
        """Nothing."""
        return None

    def select(self, nodes: Nodes) -> Int[Tensor, "rows selected"]:
        """The root."""
        return torch.zeros_like(nodes.parents)

    def learn(self, nodes: Nodes, accepted: NDArray[np.int64]) -> None:
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

    def select(self, nodes: Nodes) -> Int[Tensor, "rows nodes"]:
        """All of them."""
        index = torch.arange(nodes.tokens.shape[1], device=nodes.tokens.device)
        return torch.where(nodes.valid, index, INVALID)


class FixedTree(NoDraft):
    """Algorithm 2: D levels, of each the K_sel most probable nodes are expanded; the N_max most probable of all are verified.

    Args:
        options: E, K_sel, D and N_max.
        stop_early: whether to look, before each pass, how many nodes there are to expand; it costs a device-to-host read.
    """

    linear = False

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


class AdaptiveTree:
    """Drafts as long as it raises the expected tokens per second of the step, and not at all where plain steps are faster.

    The expected number of accepted tokens is the sum of the nodes' path probabilities, times the trust that earlier drafts of
    this row earned: accepted over expected tokens, both fading, so that a draft is tried again after a bad stretch. Only
    calibrated costs count, never the clock: the same request drafts the same on every run of one calibration.

    Args:
        costs: of this base, twig and machine.
        width: E.
    """

    FADE = 0.8
    LEVELS = 16
    """Deepest node that is drafted."""

    linear, depth = False, LEVELS

    def grows(self, nodes: Nodes) -> Bool[Tensor, "rows nodes"]:
        """Every node."""
        return nodes.valid

    def __init__(self, costs: StepCosts, width: int) -> None:
        self.alone = self.costs = costs
        self.width = width
        # Of each row: expected and accepted tokens, and of the best children the sum of their probabilities and their number.
        self.history: NDArray[np.float64] = np.zeros((4, 0))
        self.fill = self.lost = 0.0
        self._spent = 0.0
        self._kept: NDArray[np.int64] = np.zeros(0, np.int64)

    def join(self, rows: int, deferred_tokens: int) -> None:
        """Rows without a history. Putting a deferred prompt into the twig's cache is paid for by its first draft: as many seconds
        must have been lost by not drafting before they are spent, so that a short answer never pays them."""
        fresh = np.tile(np.array([[0.0], [0.0], [0.8], [1.0]]), rows)
        self.history = np.concatenate((self.history, fresh), axis=1)
        self.fill, self.lost = self.alone.fill * deferred_tokens, 0.0
        self.costs = self.alone.of_rows(self.history.shape[1])

    def leave(self, row: int) -> None:
        """Forget a row."""
        self.history[:, row] = self.history[:, -1]
        self.history = self.history[:, :-1]
        self.costs = self.alone.of_rows(max(1, self.history.shape[1]))

    def expand(
        self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int
    ) -> Int[Tensor, "rows chosen"] | None:
        """As many of the most probable nodes as promise the best rate, if that is better than to stop here.

        Of a node that is run the best child is reckoned, of that one the best child, and so on for as many levels as pay: a pass
        of two nodes may cost nearly what one of eight does, so that it looks further than the next level.
        """
        scores, able = nodes.scores.cpu().numpy().astype(np.float64), expandable.cpu().numpy()
        if level == 0:
            self._spent = 0.0
        expected, accepted, likely_sum, seen = self.history
        trust, likely = ((1 + accepted) / (1 + expected))[:, None], (likely_sum / seen)[:, None]
        stop, mass = self._stop(scores, trust, level > 0)
        if level >= self.LEVELS:
            return None
        ranked = np.argsort(np.where(able, -scores, np.inf), axis=1, kind="stable")
        running = np.cumsum(np.exp(np.take_along_axis(np.where(able, scores, -np.inf), ranked, axis=1)), axis=1)
        counts = np.arange(1, min(scores.shape[1], self.costs.most) + 1)
        room = self.costs.most - self._kept
        best = np.zeros(len(scores), np.int64)
        rate = stop.copy()
        promised = np.broadcast_to(mass, running[:, : len(counts)].shape).copy()
        draft, trunk, verify = (np.asarray(table) for table in (self.costs.draft, self.costs.trunk, self.costs.verify))
        for levels in range(1, self.LEVELS + 1):
            promised = promised + running[:, : len(counts)] * likely**levels
            size = self._kept[:, None] + levels * counts
            possible = (size <= self.costs.most) & (counts <= able.sum(axis=1, keepdims=True)) & (room[:, None] >= 1)
            if not possible.any():
                break
            drafting = levels * draft[counts] + trunk[counts]
            seconds = self._spent + drafting + verify[np.minimum(size, self.costs.most)]
            rates = np.where(possible, (1 + trust * promised) / seconds, 0.0)
            better = rates.max(axis=1) > rate
            best = np.where(better, counts[rates.argmax(axis=1)], best)
            rate = np.maximum(rate, rates.max(axis=1))
        if level == 0 and best.any() and self.lost < self.fill:
            self.lost += float(1 / stop[0] - 1 / rate[0])
            return None
        if not best.any():
            return None
        self.fill = 0.0
        self._spent += float(draft[best.max()])
        chosen = np.sort(
            np.where(np.arange(best.max()) < best[:, None], ranked[:, : best.max()], scores.shape[1]), axis=1
        )
        chosen[chosen == scores.shape[1]] = INVALID
        return torch.from_numpy(chosen).to(nodes.tokens.device)

    def select(self, nodes: Nodes) -> Int[Tensor, "rows selected"]:
        """The most probable nodes, as many as promise the best rate: `expand` found their number when it chose to stop."""
        rank = nodes.scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        allowed = torch.from_numpy(self._kept).to(rank.device)[:, None]
        return most_probable(nodes, nodes.valid & (rank < allowed), int(self._kept.max()))

    def learn(self, nodes: Nodes, accepted: NDArray[np.int64]) -> None:
        """Compare what was accepted with what was expected."""
        scores, parents = (part.cpu().numpy() for part in (nodes.scores, nodes.parents))
        path = np.exp(scores[:, 1:].astype(np.float64))
        best = np.zeros(scores.shape)
        given = np.exp(
            scores[:, 1:] - np.take_along_axis(scores, parents[:, 1:], axis=1), where=path > 0, out=np.zeros(path.shape)
        )
        rows = np.broadcast_to(np.arange(len(scores))[:, None], parents[:, 1:].shape)
        np.maximum.at(best, (rows, parents[:, 1:]), given)
        new = np.stack((path.sum(axis=1), accepted, best.sum(axis=1), (best > 0).sum(axis=1)))
        self.history = self.FADE * self.history + new

    def _stop(self, scores: Any, trust: Any, root_ran: bool) -> tuple[Any, Any]:
        """The best rate (tokens per second) that stopping here promises, and the sum of the probabilities of what is verified."""
        drafted = np.sort(scores[:, 1:], axis=1)[:, ::-1][:, : self.costs.most - 1]
        mass = np.concatenate((np.zeros((len(scores), 1)), np.cumsum(np.exp(drafted), axis=1)), axis=1)
        count = np.arange(mass.shape[1])
        # Drafted nodes have not run through the trunk yet, as a rule; the root has, once anything is drafted.
        late = np.minimum(count if root_ran else count + 1, self.costs.most)
        seconds = self._spent + np.asarray(self.costs.trunk)[late] + np.asarray(self.costs.verify)[1 + count]
        finite = np.concatenate((np.ones((len(scores), 1), bool), np.isfinite(drafted)), axis=1)
        rates = np.where(finite, (1 + trust * mass) / seconds, 0.0)
        size = rates.argmax(axis=1)
        self._kept = size + 1
        return rates.max(axis=1), np.take_along_axis(mass, size[:, None], axis=1)
