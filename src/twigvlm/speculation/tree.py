"""Token trees (Algorithm 2): what to expand, what to keep, who sees whom, and how far the base agrees. Pure functions.

A chain is a tree with one branch, so that chains and trees are verified by the same walk.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tree:
    """Drafted tokens as a tree. Node 0 is the root, the last accepted token; parents precede their children."""

    tokens: list[int]
    parents: list[int]
    """Of each node; the root is its own."""
    depths: list[int]
    """Steps from the root."""
    scores: list[float]
    """Cumulative log-probability of the path from the root."""

    @classmethod
    def rooted(cls, token: int) -> "Tree":
        """A tree of the root alone."""
        return cls([token], [0], [0], [0.0])

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.tokens)

    def add(self, token: int, parent: int, log_probability: float) -> None:
        """Add a child to a node, with its probability given the path to that node."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.scores.append(self.scores[parent] + log_probability)

    def take(self, nodes: Sequence[int]) -> "Tree":
        """The tree of these nodes, renumbered in the given order: the root first, and each after its parent."""
        places = {node: place for place, node in enumerate(nodes)}
        return Tree(
            [self.tokens[node] for node in nodes],
            [places[self.parents[node]] for node in nodes],
            [self.depths[node] for node in nodes],
            [self.scores[node] for node in nodes],
        )


def most_probable(tree: Tree, nodes: Iterable[int], count: int) -> list[int]:
    """The `count` (K_sel) nodes with the highest cumulative path probability, ascending; of equals the first ones."""
    return sorted(sorted(nodes, key=lambda node: -tree.scores[node])[:count])


def best_leaves(tree: Tree, most: int) -> list[int]:
    """The root and at most `most` (N_max) further nodes: the best leaves with all of their ancestors, ascending.

    Leaves enter by their path probability (of equals the first ones) until the nodes are used up; of the last one's path
    what still fits enters, from the root down. A node is therefore as good as the best leaf below it.
    """
    best: dict[int, tuple[float, int]] = {}
    for node in range(len(tree) - 1, 0, -1):
        leaf = best.setdefault(node, (-tree.scores[node], node))  # its children came before: without any it is a leaf
        parent = tree.parents[node]
        best[parent] = min(best.get(parent, leaf), leaf)
    ranked = sorted(range(1, len(tree)), key=best.__getitem__)  # stable: parents stay before their children
    return [0, *sorted(ranked[:most])]


def ancestors(tree: Tree, order: Sequence[int]) -> list[list[int]]:
    """For each of these nodes, the places in `order` of those that it may see: its ancestors and itself, the root included.

    A place of -1 stands for no node: it sees nothing and is seen by none.
    """
    places: dict[int, int] = {}
    for place, node in enumerate(order):
        places.setdefault(node, place)
    seen: list[list[int]] = []
    for node in order:
        row: list[int] = []
        while node >= 0:
            row.append(places[node])
            node = tree.parents[node] if node else -1
        seen.append(row)
    return seen


def walk(tree: Tree, choose: Callable[[int, Sequence[int]], int]) -> tuple[list[int], list[int]]:
    """Go down from the root while the base's choice is among the children: the longest path that the base agrees with.

    Args:
        tree: siblings have different tokens.
        choose: (node, tokens on the path from the root to it, without the root's) -> the base's choice after it. Asked
            once for each node of the accepted path, from the root on, and for no other.

    Returns:
        The accepted path, root included, and the base's choices along it: the accepted tokens and one of its own.
    """
    children = {(tree.parents[node], tree.tokens[node]): node for node in range(1, len(tree))}
    path: list[int] = [0]
    choices: list[int] = []
    while True:
        choices.append(choose(path[-1], choices))
        child = children.get((path[-1], choices[-1]))
        if child is None:
            return path, choices
        path.append(child)
