"""The walk along the accepted path, for all rows at once, against each row by itself in plain lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.speculation.forests import TOKENS, levels, planted, randoms, rows
from twigvlm.speculation.walk import walk


def agreed_path(tree, choices):
    """The longest path on which the base chooses each node's token after its parent: by looking at every node."""
    agreed = [
        node
        for node in tree.drafted
        if all(tree.tokens[each] == choices[tree.parents[each]] for each in tree.path(node)[1:])
    ]
    return tree.path(max(agreed, key=lambda node: tree.depths[node]))


def asked_of(base):
    """The base's choices as a walk asks for them, and what it has asked: step, nodes, tokens walked, rows that walk."""
    asked = []

    def choose(step, node, walked, walking):
        asked.append((step, node.tolist(), walked.tolist(), walking.tolist()))
        return base.gather(1, node[:, None])[:, 0]

    return choose, asked


@settings(max_examples=80)
@given(rows, levels, randoms, st.integers(0, 2))
def test_the_accepted_path_is_the_longest_that_the_base_agrees_with(rows, levels, random, deeper):
    nodes, trees = planted(rows, levels, random)
    base = torch.tensor([[random.randrange(TOKENS) for _ in tree.tokens] for tree in trees])
    depth = max(max(tree.depths) for tree in trees) + deeper
    choose, asked = asked_of(base)
    accepted = walk(nodes, depth, choose)
    expected = [agreed_path(tree, choices) for tree, choices in zip(trees, base.tolist(), strict=True)]
    assert accepted.counts.tolist() == [len(path) for path in expected]
    for row, path in enumerate(expected):
        count = len(path)
        assert accepted.path[row].tolist() == path + path[-1:] * (depth + 1 - count)
        # the accepted tokens, and one of the base's own
        assert accepted.tokens[row, :count].tolist() == [int(base[row, node]) for node in path]
        assert accepted.tokens[row, : count - 1].tolist() == list(trees[row].path_tokens(path[-1]))
        for step, node, walked, walking in asked:
            assert walking[row] == (step < count)
            if walking[row]:
                assert node[row] == path[step]
                assert walked[row] == list(trees[row].path_tokens(path[step]))
    assert [step for step, *_ in asked] == list(range(depth + 1))


@settings(max_examples=60)
@given(levels, randoms)
def test_coupled_rows_stop_together(levels, random):
    nodes, trees = planted(4, levels, random)
    base = torch.tensor([[random.randrange(TOKENS) for _ in tree.tokens] for tree in trees])
    depth = max(max(tree.depths) for tree in trees)
    pair = torch.tensor([0, 2])

    def couple(walked, walking):
        return walking.index_fill(0, pair, bool(walking[pair].all()))

    alone = walk(nodes, depth, asked_of(base)[0])
    coupled = walk(nodes, depth, asked_of(base)[0], couple)
    counts = alone.counts.tolist()
    together = min(counts[0], counts[2])
    assert coupled.counts.tolist() == [together, counts[1], together, counts[3]]
    for row, count in enumerate(coupled.counts.tolist()):
        assert torch.equal(coupled.path[row, :count], alone.path[row, :count])
        assert torch.equal(coupled.tokens[row, :count], alone.tokens[row, :count])
