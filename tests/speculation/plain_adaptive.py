"""What the adaptive tree decides, over lists and by trying every number of nodes."""

import math
from collections import Counter

from twigvlm.speculation.adaptive_tree import AdaptiveTree


class PlainAdaptive:
    """The objective of `AdaptiveTree` over lists: tokens above the rates so far, by trying all numbers of nodes."""

    LIKELY, LEVELS, FADE = AdaptiveTree.LIKELY, AdaptiveTree.LEVELS, AdaptiveTree.FADE

    def __init__(self, costs):
        self.alone = self.costs = costs
        self.rows = []
        self.fill = self.lost = self.spent = 0.0

    def join(self, rows, deferred_tokens):
        names = ("accepted", "steps", "seconds", "likely", "seen")
        self.rows += [{**dict.fromkeys(names, 0.0), "promised": Counter()} for _ in range(rows)]
        self.fill, self.lost = self.alone.fill * deferred_tokens, 0.0
        self.costs = self.alone.of_rows(len(self.rows))

    def leave(self, row):
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        self.costs = self.alone.of_rows(len(self.rows))

    def begin(self):
        self.spent = 0.0
        for row in self.rows:

            def lacks(trust, row=row):
                promised = sum(mass * trust**depth for depth, mass in row["promised"].items())
                return trust + promised - 1 - row["accepted"]

            low, high = 0.0, 2.0
            while high - low > 1 / 2048:  # as finely as the policy does
                middle = (low + high) / 2
                low, high = (middle, high) if lacks(middle) < 0 else (low, middle)
            row["trust"] = (low + high) / 2
            row["child"] = min(1.0, row["trust"] * (self.LIKELY + row["likely"]) / (1 + row["seen"]))
            plain = self.costs.trunk[1] + self.costs.verify[1]
            row["rate"] = max(1 / plain, (1 + row["accepted"] + row["steps"]) / (plain + row["seconds"]))

    def chance(self, row, tree, node):
        return min(1.0, math.exp(tree.scores[node]) * self.rows[row]["trust"] ** tree.depths[node])

    def worth(self, tokens, seconds):
        return tokens - sum(row["rate"] for row in self.rows) * seconds

    def ranked(self, tree, among):
        return sorted(among, key=lambda node: -tree.scores[node])

    def stopping(self, trees, ran):
        """Of having the n most probable nodes of every row verified now, for every n: worth, accepted nodes, late ones."""
        best = [self.ranked(tree, tree.drafted) for tree in trees]  # the root first
        found = []
        for count in range(1, min(max(map(len, best)), self.costs.max_nodes) + 1):
            chosen = [nodes[:count] for nodes in best]
            mass = sum(
                self.chance(row, tree, node)
                for row, (tree, nodes) in enumerate(zip(trees, chosen, strict=True))
                for node in nodes[1:]
            )
            late = max(sum(node not in seen for node in nodes) for nodes, seen in zip(chosen, ran, strict=True))
            seconds = self.spent + self.costs.trunk[late] + self.costs.verify[count]
            found.append((self.worth(len(trees) + mass, seconds), mass, late))
        return found

    def going_on(self, trees, able, kept, mass, late, levels):
        """Most that running the n most probable nodes of every row next is worth, and the tokens that it promises then, for
        every n, over how many levels may follow."""
        best = [self.ranked(tree, nodes) for tree, nodes in zip(trees, able, strict=True)]
        worth = {}
        for count in range(1, min(max(map(len, best)), self.costs.max_nodes) + 1):
            promised = len(trees) + mass
            running = [
                sum(self.chance(row, tree, node) for node in nodes[:count])
                for row, (tree, nodes) in enumerate(zip(trees, best, strict=True))
            ]
            for level in range(1, levels + 1):
                promised += sum(
                    chances * row["child"] ** level for chances, row in zip(running, self.rows, strict=True)
                )
                size = kept + level * count
                if size > self.costs.max_nodes:
                    break
                drafting = level * self.costs.draft[count] + self.costs.trunk[max(count, late)]
                found = self.worth(promised, self.spent + drafting + self.costs.verify[size]), promised
                worth[count] = max(worth.get(count, found), found)
        return worth

    def children(self, trees, ran):
        """Note the best children of the nodes that have run in this step, each once."""
        for row, tree, fresh in zip(self.rows, trees, ran, strict=True):
            for parent in fresh:
                given = [tree.scores[node] for node in tree.drafted[1:] if tree.parents[node] == parent]
                if given:
                    row["likely"] += math.exp(max(given) - tree.scores[parent])
                    row["seen"] += 1

    def learn(self, trees, accepted, late):
        verify = self.costs.verify[max(len(tree.drafted) for tree in trees)]
        seconds = self.spent + self.costs.trunk[late] + verify
        for row, tree, count in zip(self.rows, trees, accepted, strict=True):
            for name in ("accepted", "steps", "seconds", "likely", "seen"):
                row[name] *= self.FADE
            row["accepted"], row["steps"], row["seconds"] = (
                row["accepted"] + count,
                row["steps"] + 1,
                row["seconds"] + seconds,
            )
            row["promised"] = Counter({depth: mass * self.FADE for depth, mass in row["promised"].items()})
            for node in tree.drafted[1:]:
                row["promised"][tree.depths[node]] += math.exp(tree.scores[node])
