"""Token trees as plain lists, beside the tensors that hold the same nodes: one tree a row, of different sizes."""

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from twigvlm.speculation.nodes import INVALID, Nodes

TOKENS = 5


@dataclass
class PlainTree:
    """One row. Entry i of each list is node i; a node that was never drafted has score -inf."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [0])
    depths: list[int] = field(default_factory=lambda: [0])
    scores: list[float] = field(default_factory=lambda: [0.0])

    @property
    def drafted(self):
        """Nodes that exist, the root included."""
        return [node for node, score in enumerate(self.scores) if math.isfinite(score)]

    def add(self, parent, token, log_probability):
        """A child of a node; of None a node that does not exist."""
        above = 0 if parent is None else parent
        self.tokens.append(token)
        self.parents.append(above)
        self.depths.append(self.depths[above] + 1)
        self.scores.append(-math.inf if parent is None else self.scores[above] + log_probability)

    def path(self, node):
        """The nodes from the root to a node, both included."""
        return [*self.path(self.parents[node]), node] if node else [0]

    def path_tokens(self, node):
        """Tokens on the path to a node, without the root's."""
        return tuple(self.tokens[each] for each in self.path(node)[1:])


levels = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=3)
"""Of each level that is drafted: nodes that are expanded, and children of each."""
rows = st.integers(1, 4)
randoms = st.randoms(use_true_random=False)


def planted(rows, levels, random):
    """Random trees as tensors and as lists, built in the test: the type checker rolls dice, which strategies must not.

    Nodes of any depth are expanded, none twice, in some rows fewer than in others; siblings have different tokens, and
    probabilities tie often. A child may be impossible.
    """
    trees = [PlainTree([random.randrange(TOKENS)]) for _ in range(rows)]
    nodes = Nodes.rooted(torch.tensor([tree.tokens[0] for tree in trees]))
    expanded = [set() for _ in trees]
    for expand, width in levels:
        parents, tokens, steps = [], [], []
        for tree, done in zip(trees, expanded, strict=True):
            able = [node for node in tree.drafted if node not in done]
            some = sorted(random.sample(able, random.randint(0, min(expand, len(able)))))
            done.update(some)
            some += [None] * (expand - len(some))
            parents.append([INVALID if node is None else node for node in some])
            tokens.append([random.sample(range(TOKENS), width) for _ in some])
            steps.append([random.choices([0.0, -0.5, -1.0, -2.0, -math.inf], k=width) for _ in some])
            for node, new, probabilities in zip(some, tokens[-1], steps[-1], strict=True):
                for token, probability in zip(new, probabilities, strict=True):
                    tree.add(node, token, probability)
        nodes = nodes.add(torch.tensor(parents), torch.tensor(tokens), torch.tensor(steps))
    return nodes, trees


def as_lists(nodes):
    """The rows of tensors."""
    return [PlainTree(*row) for row in zip(*(part.tolist() for part in nodes), strict=True)]


def trimmed(row):
    """Indices without the INVALID ones, which are all behind."""
    count = len([index for index in row if index != INVALID])
    assert INVALID not in row[:count]
    return row[:count]
