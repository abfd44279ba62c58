"""Chains and fixed trees: what they expand and what they have verified, against plain Python over lists."""

import math
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.speculation.drafting import any_children, drafted
from tests.speculation.forests import PlainTree, as_lists, trimmed
from twigvlm.config import SpeculationConfig
from twigvlm.speculation.policies import Chain, FixedTree

static = pytest.mark.parametrize("static", [False, True])


def verified(nodes, selected):
    """Of each row, the paths that are verified."""
    trees = as_lists(nodes)
    return [
        {tree.path_tokens(node) for node in trimmed(row)} for tree, row in zip(trees, selected.tolist(), strict=True)
    ]


@static
@settings(max_examples=60)
@given(
    probabilities=st.lists(st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8), min_size=1, max_size=4),
    length=st.integers(1, 7),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    room=st.integers(0, 8),
)
def test_a_chain_ends_after_an_unlikely_token(static, probabilities, length, threshold, room):
    # The policy's are differences of float32 scores: at the threshold itself they may fall on either side.
    assume(all(p == 1 or abs(p - threshold) > 1e-4 for row in probabilities for p in row))
    policy = Chain(SpeculationConfig("chain", length, threshold), static)
    nodes, selected = drafted(policy, lambda row, path: [probabilities[row][len(path)]], len(probabilities), room)
    for row, paths in enumerate(verified(nodes, selected)):
        unlikely = (place for place, p in enumerate(probabilities[row], start=1) if p < threshold)
        expected = min(length, room, next(unlikely, length))
        assert paths == {(0,) * count for count in range(expected + 1)}


def fixed_tree(children, row, depth, width, expand, count, room):
    """Algorithm 2 over lists: the paths to verify."""
    tree, level = PlainTree([0]), [0]
    for _ in range(min(depth, room)):
        new = []
        for node in level:
            for token, probability in enumerate(children(row, tree.path_tokens(node))):
                new.append(len(tree.tokens))
                tree.add(node, token, math.log(probability))
        level = sorted(sorted(new, key=lambda node: -tree.scores[node])[:expand])
    return {tree.path_tokens(node) for node in sorted(tree.drafted, key=lambda node: -tree.scores[node])[: count + 1]}


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 8, 30]))


@static
@settings(max_examples=40)
@given(seed=st.integers(0, 999), shape=shapes, rows=st.integers(1, 3), room=st.integers(0, 5))
def test_a_fixed_tree_by_its_definition(static, seed, shape, rows, room):
    depth, width, expand, count = shape
    options = SpeculationConfig("tree", tree_depth=depth, tree_width=width, tree_expand=expand, tree_nodes=count)
    children = any_children(seed, width)
    nodes, selected = drafted(FixedTree(options, static), children, rows, room)
    expected = [fixed_tree(children, row, depth, width, expand, count, room) for row in range(rows)]
    assert verified(nodes, selected) == expected


@settings(max_examples=40)
@given(seed=st.integers(0, 9999), count=st.integers(1, 5))
def test_no_selection_of_a_fixed_tree_is_accepted_longer(seed, count):
    """Where the base draws what the twig promises, a node is accepted with the probability of its path."""
    options = SpeculationConfig("tree", tree_depth=3, tree_width=2, tree_expand=2, tree_nodes=count)
    nodes, selected = drafted(FixedTree(options, False), any_children(seed, 2))
    (tree,), kept = as_lists(nodes), selected[0].tolist()

    def accepted(some):
        return sum(math.exp(tree.scores[node]) for node in some if node)

    def is_tree(some):
        return all(tree.parents[node] in (0, *some) for node in some)

    others = combinations(tree.drafted[1:], min(count, len(tree.drafted) - 1))
    assert accepted(kept) >= (1 - 1e-6) * max(accepted(some) for some in others if is_tree(some))
