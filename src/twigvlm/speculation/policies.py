"""Which nodes of a token tree to expand, and which to have verified: by fixed settings, or by what they cost and promise."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.tree import Tree, best_leaves, most_probable


@runtime_checkable
class Policy(Protocol):
    """How one request drafts its trees."""

    def expand(self, tree: Tree, able: Sequence[int], ran: Sequence[int]) -> list[int]:
        """Nodes to run through trunk and twig next, ascending; none: the draft is complete.

        Args:
            tree: as far as it is drafted.
            able: nodes that may get children and have none yet, ascending.
            ran: nodes that have run, in that order.
        """

    def select(self, tree: Tree) -> list[int]:
        """Nodes to have verified, ascending: the root, and each with its parent. Asked when `expand` chose no more."""

    def learn(self, tree: Tree, accepted: int) -> None:
        """A tree was verified, and that many of its nodes were accepted."""

    def share(self, rows: int) -> None:
        """From now on so many answers are decoded together."""


class FixedTree:
    """Algorithm 2: D levels, of each the K_sel most probable nodes are expanded; N_max nodes are verified."""

    def __init__(self, options: SpeculationConfig) -> None:
        self.options = options

    def expand(self, tree: Tree, able: Sequence[int], ran: Sequence[int]) -> list[int]:
        """The most probable nodes of the newest level."""
        depth = tree.depths[ran[-1]] + 1 if ran else 0
        if depth >= self.options.tree_depth:
            return []
        return most_probable(tree, (node for node in able if tree.depths[node] == depth), self.options.tree_expand)

    def select(self, tree: Tree) -> list[int]:
        """The best leaves with their ancestors."""
        return best_leaves(tree, self.options.tree_nodes)

    def learn(self, tree: Tree, accepted: int) -> None:
        """Settings are settings."""

    def share(self, rows: int) -> None:
        """Settings are settings."""


class AdaptiveTree:
    """Drafts as long as it raises the expected tokens per second of the step, and not at all where plain steps are faster.

    The expected number of accepted tokens is the sum of the nodes' path probabilities, times the trust that earlier drafts of
    this request earned: accepted over expected tokens, both fading, so that a draft is tried again after a bad stretch. Only
    calibrated costs count, never the clock: the same request drafts the same on every run of one calibration.

    Args:
        costs: of this base, twig and machine.
        fill: seconds that the first draft pays for putting the prompt into the twig's cache; 0 if it is there. As many
            seconds must have been lost by not drafting before they are spent: a short answer never pays them.
    """

    FADE = 0.8

    def __init__(self, costs: StepCosts, fill: float) -> None:
        self.alone = self.costs = costs
        self.fill, self.lost = fill, 0.0
        self.expected = self.accepted = 0.0
        self.likely, self.seen = 0.8, 1.0  # sum of the best children's probabilities, and of how many
        self.spent = 0.0  # seconds of the passes of the draft at hand
        self.kept = [0]  # of the draft at hand, the nodes to verify if it ends here

    @property
    def trust(self) -> float:
        """Accepted tokens for each expected one; starts at 1."""
        return (1 + self.accepted) / (1 + self.expected)

    def expand(self, tree: Tree, able: Sequence[int], ran: Sequence[int]) -> list[int]:
        """As many of the most probable nodes as promise the best rate, if that is better than to stop here.

        Of a node that is run the best child is reckoned, of that one the best child, and so on for as many levels as pay.
        """
        if not ran:
            self.spent = 0.0
        stop, self.kept = self._best(tree, ran)
        mass = sum(math.exp(tree.scores[node]) for node in self.kept[1:])
        best, chosen = stop, 0
        ranked = sorted(able, key=lambda node: -tree.scores[node])
        likely = self.likely / self.seen
        running = 0.0
        for count, node in enumerate(ranked[: self.costs.most - len(self.kept)], start=1):
            running += math.exp(tree.scores[node])
            promised = mass
            better = False
            # A pass of two nodes may cost nearly what one of eight does: look further than the next level.
            for levels in range(1, (self.costs.most - len(self.kept)) // count + 1):
                promised += running * likely**levels
                drafting = levels * self.costs.draft[count] + self.costs.trunk[count]
                seconds = self.spent + drafting + self.costs.verify[len(self.kept) + levels * count]
                rate = (1 + self.trust * promised) / seconds
                if rate > best:
                    best, chosen, better = rate, count, True
            if not better:
                break
        if not ran and chosen and self.lost < self.fill:
            self.lost += 1 / stop - 1 / best
            return []
        if chosen:
            self.fill = 0.0
            self.spent += self.costs.draft[chosen]
        return sorted(ranked[:chosen])

    def select(self, tree: Tree) -> list[int]:
        """The most probable nodes, as many as promise the best rate: `expand` found them when it chose to stop."""
        return sorted(self.kept)

    def learn(self, tree: Tree, accepted: int) -> None:
        """Compare what was accepted with what was expected."""
        mass = sum(math.exp(score) for score in tree.scores[1:])
        self.expected, self.accepted = self.FADE * self.expected + mass, self.FADE * self.accepted + accepted
        best: dict[int, float] = {}
        for node in range(1, len(tree)):
            parent = tree.parents[node]
            best[parent] = max(best.get(parent, 0.0), math.exp(tree.scores[node] - tree.scores[parent]))
        self.likely = self.FADE * self.likely + sum(best.values())
        self.seen = self.FADE * self.seen + len(best)

    def share(self, rows: int) -> None:
        """A pass costs what all rows together cost, if the others draft as much."""
        self.costs = self.alone.of_rows(rows)

    def _best(self, tree: Tree, ran: Sequence[int]) -> tuple[float, list[int]]:
        """The best rate, in tokens per second, that stopping here promises, and the nodes to verify for it."""
        done = set(ran)
        ranked = sorted(range(1, len(tree)), key=lambda node: -tree.scores[node])
        late = 0 if 0 in done else 1
        best, size = 1 / (self.spent + self.costs.trunk[late] + self.costs.verify[1]), 0
        mass = 0.0
        for count, node in enumerate(ranked[: self.costs.most - 1], start=1):
            mass += math.exp(tree.scores[node])
            late += node not in done
            rate = (1 + self.trust * mass) / (self.spent + self.costs.trunk[late] + self.costs.verify[1 + count])
            if rate > best:
                best, size = rate, count
        return best, [0, *ranked[:size]]
