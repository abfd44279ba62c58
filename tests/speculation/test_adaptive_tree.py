"""The adaptive tree: each of its decisions is the best by its costs, and it learns which drafts are accepted."""

import dataclasses
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.speculation.drafting import any_children, drafted
from tests.speculation.forests import as_lists, trimmed
from tests.speculation.plain_adaptive import PlainAdaptive
from tests.twigs import MAX_NODES, step_costs
from twigvlm.speculation.adaptive_tree import AdaptiveTree
from twigvlm.speculation.costs import StepCosts


def check_step(policy, plain, children, rows, room=50):
    """One draft, each decision of which is the best that there is; what is verified, and how much of it has not run before."""
    ran = [set() for _ in range(rows)]
    fresh = [set() for _ in range(rows)]
    level = late = 0

    def watch(nodes, able, chosen):
        nonlocal level, late
        trees = as_lists(nodes)
        if level == 0:
            plain.begin()
        plain.children(trees, fresh)
        sizes = [len(trimmed(row)) for row in policy.select(nodes).tolist()]
        kept = max(sizes)
        assert sizes == [min(kept, len(tree.drafted)) for tree in trees]
        stopping = plain.stopping(trees, ran)
        stop, mass, late = stopping[kept - 1]
        assert stop >= max(worth for worth, _, _ in stopping) - 1e-6
        may = [[node for node, allowed in enumerate(row) if allowed] for row in able.tolist()]
        worth = plain.going_on(trees, may, kept, mass, late, plain.LEVELS - level)
        best, tokens = max(worth.values(), default=(-math.inf, 1))
        waits = level == 0 and plain.lost < plain.fill  # a deferred prompt is not paid for yet
        if chosen is None:
            assert waits or best <= stop + 1e-6
            if level == 0 and best > stop:
                plain.lost += (best - stop) / sum(row["rate"] for row in plain.rows) / tokens
            return
        assert not waits
        expanded = [trimmed(row) for row in chosen.tolist()]
        count = max(map(len, expanded))
        assert worth[count][0] >= max(stop, best) - 1e-6
        # of each row the most probable of those that may be expanded
        for tree, nodes, row in zip(trees, may, expanded, strict=True):
            assert row == sorted(plain.ranked(tree, nodes)[:count])
        for row, new in enumerate(expanded):
            fresh[row] = set(new)
            ran[row] |= fresh[row]
        plain.fill = 0.0
        plain.spent += plain.costs.draft[count]
        level += 1

    nodes, selected = drafted(policy, children, rows, room, watch)
    taken = nodes.take(selected)
    for tree in as_lists(taken):
        assert len(tree.drafted) <= plain.costs.max_nodes
        assert max(tree.depths[node] for node in tree.drafted) <= room
    return taken, late


def any_costs(random):
    """Tables of costs of small passes, which rise with the number of nodes in several shapes."""
    nodes = 12

    def table(base, slope, bend):
        return (0.0, *[base + slope * n + slope * 4 * max(0, n - bend) for n in range(1, nodes + 1)])

    unit = random.choice([0.01, 1.0])
    draft = table(random.uniform(0.05, 4) * unit, random.choice([0, 0.02, 0.3]) * unit, random.choice([3, 8]))
    verify = table(10 * unit, random.choice([0, 0.1, 1]) * unit, random.choice([3, 8]))
    return StepCosts(tuple(0.5 * seconds for seconds in draft), draft, verify, unit)


@settings(max_examples=25)
@given(random=st.randoms(use_true_random=False), width=st.integers(1, 3), room=st.sampled_from([1, 3, 50]))
def test_adaptive_drafts_are_the_best_by_their_costs_while_rows_come_and_go(random, width, room):
    costs = any_costs(random)
    policy, plain = AdaptiveTree(costs, width, static=False), PlainAdaptive(costs)
    rows = 0
    for step in range(6):
        for row in reversed(range(rows)):
            if random.random() < 0.25:
                policy.leave(row)
                plain.leave(row)
                rows -= 1
        if not rows or random.random() < 0.3:
            new = random.randint(1, 2)
            deferred = random.choice([0, 20]) if rows == 0 and new == 1 else 0
            policy.join(new, deferred)
            plain.join(new, deferred)
            rows += new
        taken, late = check_step(policy, plain, any_children(f"{random.random()} {step}", width), rows, room)
        trees = as_lists(taken)
        accepted = [random.randint(0, max(tree.depths[node] for node in tree.drafted)) for tree in trees]
        policy.learn(torch.tensor(accepted).numpy())
        plain.learn(trees, accepted, late)


def adaptive(costs, width=1, deferred_tokens=0):
    """The policy of a single row."""
    policy = AdaptiveTree(costs, width, static=False)
    policy.join(1, deferred_tokens)
    return policy


def size(policy, probabilities, room=50):
    """Drafted tokens that are verified where every node's children have these probabilities."""
    _, selected = drafted(policy, lambda row, path: probabilities, room=room)
    return selected.shape[1] - 1


def test_sure_drafts_are_long_and_unsure_ones_short():
    sizes = [size(adaptive(step_costs(per_node=0.2)), [p]) for p in (0.99, 0.8, 0.5)]
    assert sizes[0] > sizes[1] > sizes[2] >= 1


def test_nothing_is_drafted_where_plain_steps_are_faster():
    assert size(adaptive(step_costs(draft=20.0)), [0.9]) == 0
    assert size(adaptive(step_costs(draft=1.0)), [0.9]) > 0


def test_a_second_node_too_expensive_for_one_token_may_pay_for_several():
    costs = StepCosts(
        trunk=(0.0, *[0.1] * MAX_NODES),
        draft=(0.0, *[1.0] * MAX_NODES),
        verify=(0.0, 10.0, *[20.0] * (MAX_NODES - 1)),
        fill=0.0,
    )
    assert size(adaptive(costs), [0.9], room=1) == 0  # two tokens in 21 seconds are no gain on one in 10
    assert size(adaptive(costs), [0.9]) > 2


def test_expensive_nodes_make_a_chain_and_cheap_ones_a_tree():
    def widest(per_node):
        nodes, selected = drafted(adaptive(step_costs(per_node=per_node), width=3), lambda row, path: [0.5, 0.3, 0.1])
        return nodes.take(selected).depths[0].bincount().max()

    assert widest(6.0) == 1 < widest(0.1)


def test_trust_is_lost_by_rejections_and_comes_back():
    policy = adaptive(step_costs(draft=4.0))
    sizes = []
    for _ in range(12):
        _, selected = drafted(policy, lambda row, path: [0.9])
        sizes.append(selected.shape[1] - 1)
        policy.learn(torch.zeros(1, dtype=torch.long).numpy())
    assert sizes[0] > 0
    assert 0 in sizes, "drafts that are never accepted must end"
    assert any(later > 0 for later in sizes[sizes.index(0) :]), "and be tried again"
    assert sum(size > 0 for size in sizes) < len(sizes) / 2


def test_a_deferred_prompt_enters_the_twig_when_as_many_seconds_were_lost():
    policy, plain = adaptive(step_costs(fill=1.0), deferred_tokens=30), PlainAdaptive(step_costs(fill=1.0))
    plain.join(1, 30)
    steps = 0
    while not (drafted_now := len(as_lists(check_step(policy, plain, lambda row, path: [0.9], 1)[0])[0].drafted) - 1):
        steps += 1
        assert steps < 50
    assert steps > 2
    assert drafted_now > 0
    assert plain.lost >= 30.0
    assert size(policy, [0.9]) > 0, "once it is in, nothing holds drafts back"


def test_rows_are_trusted_for_themselves():
    """One row's drafts are accepted, another's are not; a third leaves, and neither is taken for the other."""

    def settled(leaving):
        policy = AdaptiveTree(step_costs(draft=4.0, per_node=0.1), 1, static=False)
        policy.join(3, 0)
        for _ in range(4):
            nodes, selected = drafted(policy, lambda row, path: [0.9], rows=3)
            taken = nodes.take(selected)
            policy.learn(torch.tensor([0, int(taken.valid[1].sum()) - 1, 0]).numpy())
        policy.leave(leaving)
        nodes, selected = drafted(policy, lambda row, path: [0.9], rows=2)
        return (nodes.take(selected).valid.sum(dim=1) - 1).tolist()

    # Rows draft equally much, the more the more is trusted; when the first one leaves, the last one stands in its place.
    assert settled(leaving=1) < settled(leaving=0) == settled(leaving=2)


@given(draft=st.floats(0.01, 3.0), per_node=st.floats(0.0, 1.0), rows=st.integers(1, 4))
def test_behind_prompts_a_chain_is_as_long_as_pays(draft, per_node, rows):
    costs = step_costs(draft=draft, per_node=per_node)
    found = AdaptiveTree(costs, 2, static=False).behind_prompts(rows).depth
    of_rows = costs.of_rows(rows)

    def worth(length):
        tokens = sum(AdaptiveTree.LIKELY**depth for depth in range(length + 1))
        seconds = length * of_rows.draft[1] + of_rows.verify[1 + length] + (of_rows.trunk[1] if length else 0)
        return tokens - seconds / (of_rows.trunk[1] + of_rows.verify[1])

    assert worth(found) >= max(map(worth, range(6))) - 1e-9


def test_nothing_is_drafted_behind_prompts_where_drafts_are_dear():
    assert AdaptiveTree(step_costs(draft=1000.0), 2, static=False).behind_prompts(2).depth == 0
    assert AdaptiveTree(step_costs(draft=0.01, per_node=0.0), 2, static=False).behind_prompts(2).depth == 5
    # The trunk's pass on a chain's last node counts: without it a token would cost 30 s of a plain step's 50, and pay.
    dear = dataclasses.replace(step_costs(draft=30.0, per_node=0.0), trunk=(0.0, *[40.0] * MAX_NODES))
    assert AdaptiveTree(dear, 2, static=False).behind_prompts(1).depth == 0
