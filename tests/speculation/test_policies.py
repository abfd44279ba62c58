"""Cost-aware drafts: of the size that costs and promises call for, none where none pays, and never another answer."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.decoding.test_exactness import grown
from twigvlm.speculation.tree import Tree

from tests.tiny import prompt
from twigvlm import TwigVLM
from twigvlm.speculation.costs import NODES, StepCosts, calibrate
from twigvlm.speculation.policies import AdaptiveTree

MOST = 64


def costs(draft=1.0, verify=10.0, per_node=0.0, fill=0.0):
    """Passes that cost a constant, and a verification that costs more for more nodes."""
    constant = (0.0, *[draft] * MOST)
    return StepCosts(
        trunk=(0.0, *[0.1] * MOST),
        draft=constant,
        verify=(0.0, *[verify + per_node * (nodes - 1) for nodes in range(1, MOST + 1)]),
        fill=fill,
    )


def drafted(policy, probabilities, room=50):
    """The tree that a policy drafts if every node's children have these probabilities, and what it selects."""
    tree, ran, able = Tree.rooted(0), [], [0]
    while level := policy.expand(tree, able, ran):
        assert set(level) <= set(able)
        ran += level
        able = [node for node in able if node not in level]
        for node in level:
            for token, probability in enumerate(probabilities):
                if tree.depths[node] < room:
                    able.append(len(tree))
                tree.add(token, node, math.log(probability))
        able = [node for node in able if tree.depths[node] < room]
    return tree, policy.select(tree)


def test_sure_drafts_are_long_and_unsure_ones_short():
    sizes = [len(drafted(AdaptiveTree(costs(per_node=0.2), 0.0), [p])[1]) - 1 for p in (0.99, 0.8, 0.5)]
    assert sizes[0] > sizes[1] > sizes[2] >= 1


def test_what_costs_more_than_it_promises_is_not_drafted():
    assert drafted(AdaptiveTree(costs(draft=20.0), 0.0), [0.9])[1] == [0]
    assert len(drafted(AdaptiveTree(costs(draft=1.0), 0.0), [0.9])[1]) > 1


def test_a_second_node_too_dear_for_one_token_may_pay_for_several():
    alone_dear = StepCosts(
        trunk=(0.0, *[0.1] * MOST), draft=(0.0, *[1.0] * MOST), verify=(0.0, 10.0, *[20.0] * (MOST - 1)), fill=0.0
    )
    assert len(drafted(AdaptiveTree(alone_dear, 0.0), [0.9], room=1)[1]) == 1, (
        "two tokens in 21 are no gain on one in 10"
    )
    assert len(drafted(AdaptiveTree(alone_dear, 0.0), [0.9])[1]) > 3


def test_dear_nodes_make_a_chain_and_cheap_ones_a_tree():
    def widest(per_node):
        tree, kept = drafted(AdaptiveTree(costs(per_node=per_node), 0.0), [0.5, 0.3, 0.1])
        depths = [tree.depths[node] for node in kept]
        return max(depths.count(depth) for depth in depths)

    assert widest(6.0) == 1 < widest(0.1)


@given(
    probabilities=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=3),
    draft=st.floats(0.1, 20),
    per_node=st.floats(0, 5),
    room=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_selection_is_a_tree_that_beats_every_smaller_one(probabilities, draft, per_node, room):
    total = sum(probabilities)
    probabilities = [p / total for p in probabilities]
    policy = AdaptiveTree(costs(draft, per_node=per_node), 0.0)
    tree, kept = drafted(policy, probabilities, room)
    assert kept[0] == 0
    assert len(kept) <= MOST
    assert all(tree.parents[node] in kept for node in kept)
    assert max(tree.depths) <= room

    def rate(nodes):
        mass = sum(math.exp(tree.scores[node]) for node in nodes[1:])
        return (1 + mass) / (policy.spent + 10 + per_node * (len(nodes) - 1))

    by_score = sorted(kept[1:], key=lambda node: -tree.scores[node])
    least = 0.99 * rate([0, *by_score])  # the trunk's pass for late nodes is a hundredth of a verification here
    assert all(rate([0, *by_score]) >= least >= 0.98 * rate([0, *by_score[:size]]) for size in range(len(by_score)))


def test_trust_is_lost_by_rejections_and_comes_back():
    policy = AdaptiveTree(costs(draft=4.0), 0.0)
    sizes = []
    for _ in range(12):
        tree, kept = drafted(policy, [0.9])
        sizes.append(len(kept) - 1)
        policy.learn(tree.take(kept), 0)
    assert sizes[0] > 0
    assert 0 in sizes, "drafts that are never accepted must end"
    assert any(later > 0 for later in sizes[sizes.index(0) :]), "and be tried again"
    assert sum(size > 0 for size in sizes) < len(sizes) / 2


def test_the_prompt_enters_the_twig_only_when_as_much_was_lost():
    policy = AdaptiveTree(costs(), fill=30.0)
    steps = 0
    while len(drafted(policy, [0.9])[1]) == 1:
        policy.learn(Tree.rooted(0), 0)
        steps += 1
        assert steps < 50
    assert steps > 2
    assert len(drafted(policy, [0.9])[1]) > 1, "once it is in, nothing holds drafts back"


@pytest.mark.parametrize("pruning", [{}, {"keep": 5, "final_wipe": 4}])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_auto_never_changes_the_answer(pruning, attention, monkeypatch):
    drafts = set()
    for seed, drafting in enumerate((0.01, 0.3, 5.0)):
        model, inputs = grown(seed=seed, attention=attention), prompt(seed)
        made = costs(drafting, per_node=0.02, fill=0.01)
        monkeypatch.setattr(TwigVLM, "costs", lambda self, made=made: made)
        plain = model.generate(**inputs, **pruning, max_new_tokens=24)
        output = model.generate(**inputs, **pruning, max_new_tokens=24, speculate="auto", return_dict_in_generate=True)
        assert output.sequences.tolist() == plain.tolist()
        assert output.costs is made
        drafts |= set(output.drafted_lengths[0])
    assert 0 in drafts
    assert max(drafts) > 1


def test_costs_are_measured_once_and_grow_with_the_size():
    model = grown(seed=0)
    made = calibrate(model.base, model.twig, repeats=1)
    for table in (made.trunk, made.draft, made.verify):
        assert len(table) == NODES[-1] + 1
        assert table[0] == 0 < table[1]
        assert all(low <= high for low, high in pairwise(table))
    assert made.most == MOST
    assert model.costs() is model.costs()


def test_interpolation_meets_the_points():
    from twigvlm.speculation.costs import _interpolated

    assert _interpolated([(0, 0.0), (1, 2.0), (3, 4.0)]) == pytest.approx((0.0, 2.0, 3.0, 4.0))
    assert torch.tensor(_interpolated([(0, 0.0), (4, 4.0)])).diff().allclose(torch.ones(4))
