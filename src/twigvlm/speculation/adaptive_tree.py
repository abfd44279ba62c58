"""Trees of the size that pays, by what a step costs and what the draft promises."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from twigvlm.config import SpeculationConfig
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.nodes import INVALID, Nodes
from twigvlm.speculation.policies import Chain, DraftPolicy

Numbers = NDArray[np.float64]


class AdaptiveTree(DraftPolicy):
    """Drafts as long as what a pass promises is worth its seconds, and not at all where plain steps are faster.

    The value of a step is the number of tokens it is expected to add to all rows, minus the number those rows would produce in
    the same time at their rates so far. Choosing the steps of highest value gives the highest rate for whole answers.

    All rows run equally many nodes, since a pass costs what its longest row does. A node counts as much as its path is probable
    by the twig, times trust^depth, for the twig errs by a factor per token: the one by which the earlier drafts of this row
    would have been accepted as often as they were. What is earlier counts less, so that a draft is tried again after a bad
    stretch. Only calibrated costs count, never the clock: the same request drafts the same on every run of one calibration.

    Args:
        costs: costs of this base, twig and machine.
        width: E.
        static: whether the shapes of passes do not depend on what was drafted, which saves reads from the device.
    """

    FADE = 0.9
    LEVELS = 16
    """Deepest node that is drafted."""
    LIKELY = 0.8
    """Probability of a best child, as long as nothing is known of a row."""

    linear, depth, uses_twig = False, LEVELS, True

    def __init__(self, costs: StepCosts, width: int, static: bool) -> None:
        self.alone = self.costs = costs
        self.width, self.static = width, static
        # Of each row: probabilities of the paths to verified nodes, added up for each depth.
        self.promised: Numbers = np.zeros((0, self.LEVELS + 1))
        # Of each row: accepted nodes, steps and their seconds; probabilities of best children, added up, and their number.
        self.history: Numbers = np.zeros((0, 5))
        # Of the step: what the history says of each row, what was spent, and what is drafted, run and to be verified.
        self.fill = self.lost = self._spent = 0.0
        self._trust = self._rate = np.zeros(0)
        self._descent = np.zeros((0, self.LEVELS))
        self._scores: Numbers = np.zeros((0, 0))
        self._depths = self._ranked = self._chosen = np.zeros((0, 0), np.int64)
        self._ran = np.zeros((0, 0), bool)
        self._kept, self._late = np.zeros(0, np.int64), 0

    def join(self, rows: int, deferred_tokens: int) -> None:
        """Rows without a history. Putting a deferred prompt into the twig's cache is paid for by its first draft: as many seconds
        must have been lost by not drafting before they are spent, so that a short answer never pays them."""
        self.promised, self.history = (np.pad(part, ((0, rows), (0, 0))) for part in (self.promised, self.history))
        self.fill, self.lost = self.alone.fill * deferred_tokens, 0.0
        self.costs = self.alone.of_rows(len(self.history))

    def leave(self, row: int) -> None:
        """Forget a row."""
        self.promised[row], self.history[row] = self.promised[-1], self.history[-1]
        self.promised, self.history = self.promised[:-1], self.history[:-1]
        self.costs = self.alone.of_rows(max(1, len(self.history)))

    def behind_prompts(self, rows: int) -> DraftPolicy:
        """A published chain, no longer than pays if the twig is right as often as a row is expected to find it at first."""
        chain, costs = SpeculationConfig("chain"), self.alone.of_rows(rows)
        depths = np.arange(chain.draft_length + 1)
        plain = costs.trunk[1] + costs.verify[1]
        # The trunk sees the last node of a chain too, which the twig does not.
        seconds = depths * costs.draft[1] + (depths > 0) * costs.trunk[1] + np.array(costs.verify)[1 + depths]
        worth = np.cumsum(self.LIKELY**depths) - seconds / plain
        best = int(worth.argmax())
        return Chain(replace(chain, draft_length=best), self.static) if best else DraftPolicy()

    def expand(
        self, nodes: Nodes, expandable: Bool[Tensor, "rows nodes"], level: int
    ) -> Int[Tensor, "rows chosen"] | None:
        """As many of the most probable nodes as are worth most, if that is more than to stop here is worth.

        Of a node that is run the best child is reckoned, of that one the best child, and so on for as many levels as pay: a pass
        of two nodes may cost nearly what one of eight does, so that it looks further than the next level.
        """
        of_nodes = torch.stack((nodes.scores, nodes.depths.float(), expandable.float())).cpu().numpy()
        self._see(of_nodes[0].astype(np.float64), of_nodes[1].astype(np.int64), level)
        able = of_nodes[2] > 0
        chances = np.minimum(1.0, np.exp(self._scores) * self._trust[:, None] ** self._depths)
        stop, mass = self._stop(chances)
        counts = able.sum(axis=1)
        if level >= self.LEVELS or not counts.any():
            return None
        ranked = np.argsort(np.where(able, -self._scores, np.inf), axis=1, kind="stable")
        ranked = ranked[:, : min(self.costs.max_nodes, counts.max())]
        running = np.cumsum(np.take_along_axis(chances * able, ranked, axis=1), axis=1)
        worth, tokens = self._going_on(running, mass, self.LEVELS - level)
        best = int(worth.argmax())
        if worth[best] <= stop:
            return None
        if level == 0 and self.lost < self.fill:
            # Of one token: a plain step brings no more.
            self.lost += float((worth[best] - stop) / self._rate.sum() / tokens[best])
            return None
        self.fill = 0.0
        self._spent += self.costs.draft[best + 1]
        self._chosen = _ascending(ranked[:, : best + 1], np.minimum(counts, best + 1))
        np.put_along_axis(self._ran, np.maximum(self._chosen, 0), True, axis=1)  # the root has run in any case
        return torch.from_numpy(self._chosen).to(nodes.tokens.device)

    def select(self, nodes: Nodes) -> Int[Tensor, "rows selected"]:
        """The most probable nodes, as many as are worth most: `expand` found them when it chose to stop."""
        return torch.from_numpy(_ascending(self._ranked[:, : self._kept.max()], self._kept)).to(nodes.tokens.device)

    def learn(self, accepted: NDArray[np.int64]) -> None:
        """Compare what was accepted with what was promised."""
        self._spent += self.costs.trunk[self._late] + self.costs.verify[self._kept.max()]
        self.promised *= self.FADE
        self.history *= self.FADE
        self.history[:, 0] += accepted
        self.history[:, 1] += 1
        self.history[:, 2] += self._spent
        for row, count in enumerate(self._kept):
            drafted = self._ranked[row, 1:count]
            np.add.at(self.promised[row], self._depths[row, drafted], np.exp(self._scores[row, drafted]))

    def _begin(self) -> None:
        """What the rows' history says of a new step.

        Trust is the factor per token by which the promises, and one sure token that was accepted, amount to what was accepted;
        the rate is that of accepted and own tokens, one plain step included, and never less than that of plain steps.
        """
        accepted, steps, seconds, likely, seen = self.history.T
        powers = np.arange(self.LEVELS + 1)
        low, high = np.zeros(len(accepted)), np.full(len(accepted), 2.0)
        for _ in range(12):
            middle = (low + high) / 2
            less = middle + (self.promised * middle[:, None] ** powers).sum(axis=1) < 1 + accepted
            low, high = np.where(less, middle, low), np.where(less, high, middle)
        self._trust = (low + high) / 2
        plain = self.costs.trunk[1] + self.costs.verify[1]
        self._rate = np.maximum(1 / plain, (1 + accepted + steps) / (plain + seconds))
        child = np.minimum(1.0, (self.LIKELY + likely) / (1 + seen) * self._trust)
        self._descent = np.cumsum(child[:, None] ** powers[1:], axis=1)
        self._spent = 0.0

    def _see(self, scores: Numbers, depths: NDArray[np.int64], level: int) -> None:
        """Nodes as far as they are drafted; the last ones are children of those that ran last, E of each, the best one first."""
        if level == 0:
            self._begin()
            self._ran = np.zeros(scores.shape, bool)
        else:
            known = self._ran.shape[1]
            self._ran = np.pad(self._ran, ((0, 0), (0, scores.shape[1] - known)))
            best = scores[:, known :: (scores.shape[1] - known) // self._chosen.shape[1]]
            given = np.exp(best - np.take_along_axis(scores, np.maximum(self._chosen, 0), axis=1))
            self.history[:, 3:] += np.stack((given.sum(axis=1), (given > 0).sum(axis=1)), axis=1)
        self._scores, self._depths = scores, depths

    def _stop(self, chances: Numbers) -> tuple[float, float]:
        """What it is worth to stop here, and the accepted nodes that it promises, of all rows."""
        self._ranked = np.argsort(-self._scores, axis=1, kind="stable")[:, : self.costs.max_nodes]
        mass = np.cumsum(np.take_along_axis(chances, self._ranked, axis=1), axis=1) - 1
        drafted = np.isfinite(np.take_along_axis(self._scores, self._ranked, axis=1))
        late = np.cumsum(drafted & ~np.take_along_axis(self._ran, self._ranked, axis=1), axis=1).max(axis=0)
        seconds = self._spent + np.array(self.costs.trunk)[late] + np.array(self.costs.verify[1 : 1 + mass.shape[1]])
        worth = (1 + mass).sum(axis=0) - self._rate.sum() * seconds
        best = int(worth.argmax())
        self._kept, self._late = np.minimum(1 + best, drafted.sum(axis=1)), int(late[best])
        return float(worth[best]), float(mass[:, best].sum())

    def _going_on(self, running: Numbers, mass: float, levels: int) -> tuple[Numbers, Numbers]:
        """What it is worth to run the n most probable nodes, for the best number of levels that may follow, and the tokens that
        it promises, of all rows; entry n - 1.

        Args:
            running: chances of the n most probable nodes of each row that may be run, added up.
            mass: accepted nodes that stopping promises.
            levels: that may follow.
        """
        sizes, level = np.arange(1, running.shape[1] + 1), np.arange(1, levels + 1)[:, None]
        promised = len(running) + mass + self._descent[:, :levels].T @ running
        verified = self._kept.max() + level * sizes
        draft, trunk, verify = (np.array(table) for table in (self.costs.draft, self.costs.trunk, self.costs.verify))
        late = trunk[np.maximum(sizes, self._late)]
        seconds = self._spent + level * draft[sizes] + late + verify[np.minimum(verified, self.costs.max_nodes)]
        worth = np.where(verified <= self.costs.max_nodes, promised - self._rate.sum() * seconds, -np.inf)
        best = worth.argmax(axis=0)[None]
        return np.take_along_axis(worth, best, axis=0)[0], np.take_along_axis(promised, best, axis=0)[0]


def _ascending(nodes: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first ones of some nodes in each row, ascending, padded at the end with INVALID."""
    last = np.iinfo(np.int64).max
    kept = np.sort(np.where(np.arange(nodes.shape[1]) < counts[:, None], nodes, last), axis=1)
    return np.where(kept == last, INVALID, kept)
