"""Token trees against their definitions, by brute force over the paths from the root."""

from hypothesis import given
from hypothesis import strategies as st
from twigvlm.speculation.tree import Tree, ancestors, best_leaves, most_probable, walk

branches = st.lists(st.tuples(st.integers(0, 13), st.integers(0, 4), st.integers(0, 3)), max_size=14)
"""(parent, token, minus the log-probability) of each node, with ties; parents count modulo the nodes before."""


def planted(branches):
    """The tree of these nodes; siblings differ. Not built in a strategy: the type checker rolls dice."""
    tree = Tree.rooted(9)
    for parent, token, score in branches:
        parent %= len(tree)
        if (parent, token) not in zip(tree.parents, tree.tokens, strict=True):
            tree.add(token, parent, -float(score))
    return tree


def path_to(tree, node):
    """The nodes from the root to a node, both included."""
    return [*path_to(tree, tree.parents[node]), node] if node else [0]


@given(branches)
def test_depth_and_score_are_those_of_the_path(branches):
    tree = planted(branches)
    steps = [0.0] + [tree.scores[node] - tree.scores[tree.parents[node]] for node in range(1, len(tree))]
    for node in range(len(tree)):
        path = path_to(tree, node)
        assert path == sorted(path)  # parents come first
        assert tree.depths[node] == len(path) - 1
        assert tree.scores[node] == sum(steps[one] for one in path)


@given(branches, st.data())
def test_a_node_sees_itself_and_its_ancestors_exactly(branches, data):
    tree = planted(branches)
    order = [*range(len(tree)), -1]
    seen = ancestors(tree, order)
    for node in range(len(tree)):
        assert sorted(seen[node]) == path_to(tree, node)
    assert seen[-1] == []  # what stands for no node
    shuffled = data.draw(st.permutations(order))
    for node, places in zip(shuffled, ancestors(tree, shuffled), strict=True):
        assert sorted(shuffled[place] for place in places) == (path_to(tree, node) if node >= 0 else [])


@given(branches, st.integers(1, 16))
def test_the_best_leaves_stay_with_all_their_ancestors(branches, most):
    tree = planted(branches)
    kept = best_leaves(tree, most)
    assert kept == sorted(set(kept))
    assert len(kept) == min(most + 1, len(tree))  # as many as may be
    assert all(tree.parents[node] in kept for node in kept)
    expected = {0}
    leaves = set(range(1, len(tree))) - set(tree.parents)
    for leaf in sorted(leaves, key=lambda node: (-tree.scores[node], node)):
        for node in path_to(tree, leaf):
            if len(expected) <= most:
                expected.add(node)
    assert set(kept) == expected


@given(branches, st.integers(1, 16))
def test_taking_nodes_keeps_their_paths(branches, most):
    tree = planted(branches)
    kept = best_leaves(tree, most)
    taken = tree.take(kept)
    for place, node in enumerate(kept):
        assert [kept[one] for one in path_to(taken, place)] == path_to(tree, node)
        assert (taken.tokens[place], taken.depths[place]) == (tree.tokens[node], tree.depths[node])
        assert taken.scores[place] == tree.scores[node]


@given(branches, st.integers(1, 6))
def test_the_most_probable_nodes_are_expanded(branches, count):
    tree = planted(branches)
    nodes = [node for node in range(len(tree)) if tree.depths[node] == max(tree.depths)]
    chosen = most_probable(tree, nodes, count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, len(nodes))
    for node in set(nodes) - set(chosen):
        assert all((tree.scores[one], -one) > (tree.scores[node], -node) for one in chosen)


@given(branches, st.lists(st.integers(0, 4), min_size=15, max_size=15))
def test_the_accepted_path_is_the_longest_that_the_base_agrees_with(branches, base):
    """`base`: its choice after each node."""
    tree = planted(branches)
    asked = []

    def choose(node, drafted):
        asked.append(node)
        assert list(drafted) == [tree.tokens[one] for one in path_to(tree, node)[1:]]
        return base[node]

    path, choices = walk(tree, choose)
    agreed = [
        node
        for node in range(len(tree))
        if all(tree.tokens[one] == base[tree.parents[one]] for one in path_to(tree, node)[1:])
    ]
    assert path == path_to(tree, max(agreed, key=lambda node: tree.depths[node]))
    assert choices == [base[node] for node in path]
    assert asked == path
