"""Token trees of several rows as tensors, against the same trees as plain lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.speculation.forests import as_lists, levels, planted, randoms, rows, trimmed
from twigvlm.speculation.nodes import INVALID, Nodes, ancestor_mask, most_probable

trees = given(rows, levels, randoms)


@trees
def test_depths_and_scores_are_those_of_the_paths(rows, levels, random):
    nodes, expected = planted(rows, levels, random)
    assert as_lists(nodes) == expected
    assert nodes.valid.tolist() == [[node in tree.drafted for node in range(len(tree.tokens))] for tree in expected]


@settings(max_examples=60)
@given(rows, levels, randoms, st.integers(1, 16))
def test_the_most_probable_nodes_come_with_their_ancestors(rows, levels, random, count):
    nodes, expected = planted(rows, levels, random)
    chosen = most_probable(nodes, nodes.valid, count).tolist()
    for row, tree in zip(chosen, expected, strict=True):
        ranked = sorted(tree.drafted, key=lambda node: (-tree.scores[node], node))  # of equals the first ones
        assert trimmed(row) == sorted(ranked[:count])
        assert len(row) == min(count, len(tree.tokens))
        assert all(tree.parents[node] in row for node in trimmed(row))


@settings(max_examples=60)
@given(rows, levels, randoms, st.integers(1, 6))
def test_the_most_probable_among_some(rows, levels, random, count):
    nodes, expected = planted(rows, levels, random)
    among = [[random.random() < 0.6 for _ in tree.tokens] for tree in expected]
    chosen = most_probable(nodes, torch.tensor(among), count).tolist()
    for row, tree, allowed in zip(chosen, expected, among, strict=True):
        able = [node for node in tree.drafted if allowed[node]]
        assert trimmed(row) == sorted(sorted(able, key=lambda node: -tree.scores[node])[:count])


@settings(max_examples=60)
@given(rows, levels, randoms)
def test_a_node_sees_itself_and_its_ancestors_exactly(rows, levels, random):
    nodes, expected = planted(rows, levels, random)

    def some():
        """Nodes of each row in any order, and some that stand for none."""
        size = random.randint(1, len(expected[0].tokens))
        orders = [random.sample([*range(len(tree.tokens)), INVALID, INVALID], size) for tree in expected]
        return orders, torch.tensor(orders)

    (queries, asked), (keys, shown) = some(), some()
    deepest = max(max(tree.depths) for tree in expected)
    seen = ancestor_mask(nodes.parents, asked, shown, deepest).tolist()
    for row, tree in enumerate(expected):
        for query, allowed in zip(queries[row], seen[row], strict=True):
            path = [] if query == INVALID else tree.path(query)
            assert allowed == [key in path for key in keys[row]]


@settings(max_examples=60)
@given(rows, levels, randoms, st.integers(1, 16))
def test_taken_nodes_keep_their_paths(rows, levels, random, count):
    nodes, expected = planted(rows, levels, random)
    chosen = most_probable(nodes, nodes.valid, count)
    for row, tree, taken in zip(chosen.tolist(), expected, as_lists(nodes.take(chosen)), strict=True):
        kept = trimmed(row)
        assert taken.drafted == list(range(len(kept)))  # what is behind the chosen ones is no node
        for place, node in enumerate(kept):
            assert [kept[each] for each in taken.path(place)] == tree.path(node)
            assert taken.path_tokens(place) == tree.path_tokens(node)
            assert (taken.depths[place], taken.scores[place]) == (tree.depths[node], tree.scores[node])


def test_roots_alone():
    nodes = Nodes.rooted(torch.tensor([7, 3]))
    assert [tree.tokens for tree in as_lists(nodes)] == [[7], [3]]
    assert nodes.valid.all()
