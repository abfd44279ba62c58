"""Policies: what they expand and what they have verified, against plain Python over lists."""

import math
import random as rng
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.speculation.forests import PlainTree, as_lists, trimmed
from tests.twigs import MAX_NODES, step_costs
from twigvlm.config import SpeculationConfig
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.nodes import INVALID, Nodes
from twigvlm.speculation.policies import AdaptiveTree, Chain, FixedTree

early = pytest.mark.parametrize("stop_early", [True, False])


def drafted(policy, children, rows=1, room=50, watch=None):
    """What a policy drafts, and what of it is verified.

    Args:
        policy: of the drafts.
        children: (row, tokens on the path) -> probabilities of the E next tokens.
        rows: number of rows.
        room: of the deepest node.
        watch: called with the nodes, what may be expanded and what the policy chose, before each pass.
    """
    nodes = Nodes.rooted(torch.zeros(rows, dtype=torch.long))
    ran = [set() for _ in range(rows)]
    level = 0
    while True:
        trees = as_lists(nodes)
        fresh = torch.tensor(
            [[node not in ran[row] for node in range(len(tree.tokens))] for row, tree in enumerate(trees)]
        )
        able = policy.grows(nodes) & fresh & (nodes.depths < room)
        chosen = policy.expand(nodes, able, level)
        if watch is not None:
            watch(nodes, able, chosen)
        if chosen is None:
            return nodes, policy.select(nodes)
        for row, indices in enumerate(chosen.tolist()):
            assert trimmed(indices) == sorted(set(indices) - {INVALID})
            ran[row] |= set(indices)
        parents = chosen.masked_fill(~able.gather(1, chosen.clamp(min=0)), INVALID)
        steps = [
            [children(row, tree.path_tokens(max(parent, 0))) for parent in parents[row].tolist()]
            for row, tree in enumerate(trees)
        ]
        tokens = torch.arange(policy.width).expand(rows, parents.shape[1], -1)
        nodes = nodes.add(parents, tokens, torch.tensor(steps).log())
        level += 1


def any_children(seed, width):
    """Probabilities of children that differ from path to path."""

    def children(row, path):
        random = rng.Random(f"{seed} {row} {path}")
        shares = sorted((random.uniform(0.05, 1.0) for _ in range(width)), reverse=True)
        return [share / (sum(shares) + random.uniform(0.0, 0.5)) for share in shares]

    return children


def verified(nodes, selected):
    """Of each row, the paths that are verified."""
    trees = as_lists(nodes)
    return [
        {tree.path_tokens(node) for node in trimmed(row)} for tree, row in zip(trees, selected.tolist(), strict=True)
    ]


@early
@settings(max_examples=60)
@given(
    probabilities=st.lists(st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8), min_size=1, max_size=4),
    length=st.integers(1, 7),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    room=st.integers(0, 8),
)
def test_a_chain_ends_after_an_unlikely_token(stop_early, probabilities, length, threshold, room):
    # The policy's are differences of float32 scores: at the threshold itself they may fall on either side.
    assume(all(p == 1 or abs(p - threshold) > 1e-4 for row in probabilities for p in row))
    policy = Chain(SpeculationConfig("chain", length, threshold), stop_early)
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


@early
@settings(max_examples=40)
@given(seed=st.integers(0, 999), shape=shapes, rows=st.integers(1, 3), room=st.integers(0, 5))
def test_a_fixed_tree_by_its_definition(stop_early, seed, shape, rows, room):
    depth, width, expand, count = shape
    options = SpeculationConfig("tree", tree_depth=depth, tree_width=width, tree_expand=expand, tree_nodes=count)
    children = any_children(seed, width)
    nodes, selected = drafted(FixedTree(options, stop_early), children, rows, room)
    expected = [fixed_tree(children, row, depth, width, expand, count, room) for row in range(rows)]
    assert verified(nodes, selected) == expected


@settings(max_examples=40)
@given(seed=st.integers(0, 9999), count=st.integers(1, 5))
def test_no_selection_of_a_fixed_tree_is_accepted_longer(seed, count):
    """Where the base draws what the twig promises, a node is accepted with the probability of its path."""
    options = SpeculationConfig("tree", tree_depth=3, tree_width=2, tree_expand=2, tree_nodes=count)
    nodes, selected = drafted(FixedTree(options, True), any_children(seed, 2))
    (tree,), kept = as_lists(nodes), selected[0].tolist()

    def accepted(some):
        return sum(math.exp(tree.scores[node]) for node in some if node)

    def is_tree(some):
        return all(tree.parents[node] in (0, *some) for node in some)

    others = combinations(tree.drafted[1:], min(count, len(tree.drafted) - 1))
    assert accepted(kept) >= (1 - 1e-6) * max(accepted(some) for some in others if is_tree(some))


class PlainAdaptive:
    """The objective of `AdaptiveTree` for every row by itself, over lists: tokens per second, by trying all there is."""

    def __init__(self, costs):
        self.alone = self.costs = costs
        self.rows = []  # expected and accepted tokens, probabilities of best children and their number
        self.spent = 0.0
        self.fill = self.lost = 0.0

    def join(self, rows, deferred_tokens):
        self.rows += [(0.0, 0.0, 0.8, 1.0)] * rows
        self.fill, self.lost = self.alone.fill * deferred_tokens, 0.0
        self.costs = self.alone.of_rows(len(self.rows))

    def leave(self, row):
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        self.costs = self.alone.of_rows(len(self.rows))

    def trust(self, row):
        expected, accepted, _, _ = self.rows[row]
        return (1 + accepted) / (1 + expected)

    def stopping(self, row, tree, started):
        """Rate of having the n most probable nodes verified now, for every n."""
        ranked = sorted((tree.scores[node] for node in tree.drafted[1:]), reverse=True)
        rates, most = [], self.costs.most
        for count in range(min(len(ranked), most - 1) + 1):
            mass = sum(map(math.exp, ranked[:count]))
            late = min(count if started else count + 1, most)
            seconds = self.spent + self.costs.trunk[late] + self.costs.verify[1 + count]
            rates.append(((1 + self.trust(row) * mass) / seconds, mass))
        return rates

    def going_on(self, row, tree, able, kept, mass):
        """Best rate of running the n most probable nodes next, for every n, over how many levels may follow."""
        _, _, likely, seen = self.rows[row]
        most, trust = self.costs.most, self.trust(row)
        ranked = sorted((tree.scores[node] for node in able), reverse=True)
        rates = {}
        for count in range(1, min(len(ranked), most) + 1):
            promised, running = mass, sum(map(math.exp, ranked[:count]))
            for levels in range(1, AdaptiveTree.LEVELS + 1):
                promised += running * (likely / seen) ** levels
                size = kept + levels * count
                if size > most:
                    break
                drafting = levels * self.costs.draft[count] + self.costs.trunk[count]
                seconds = self.spent + drafting + self.costs.verify[size]
                rates[count] = max(rates.get(count, 0.0), (1 + trust * promised) / seconds)
        return rates

    def learn(self, trees, accepted):
        for row, (tree, count) in enumerate(zip(trees, accepted, strict=True)):
            best = {}
            for node in tree.drafted[1:]:
                parent = tree.parents[node]
                given = math.exp(tree.scores[node] - tree.scores[parent])
                best[parent] = max(best.get(parent, 0.0), given)
            mass = sum(math.exp(tree.scores[node]) for node in tree.drafted[1:])
            new = mass, count, sum(best.values()), len(best)
            self.rows[row] = tuple(
                AdaptiveTree.FADE * old + more for old, more in zip(self.rows[row], new, strict=True)
            )


def check_step(policy, plain, children, rows, room=50):
    """One draft, each decision of which is the best that there is; what is verified."""
    level = 0

    def watch(nodes, able, chosen):
        nonlocal level
        trees, best, stops = as_lists(nodes), [], []
        if level == 0:
            plain.spent = 0.0
        sizes = [len(trimmed(row)) for row in policy.select(nodes).tolist()]
        counts = [0] * rows if chosen is None else [len(trimmed(row)) for row in chosen.tolist()]
        for row, (tree, kept, count) in enumerate(zip(trees, sizes, counts, strict=True)):
            stopping = plain.stopping(row, tree, level > 0)
            stop, mass = stopping[kept - 1]
            assert stop >= (1 - 1e-6) * max(rate for rate, _ in stopping)
            may = [node for node, allowed in enumerate(able[row].tolist()) if allowed]
            rates = plain.going_on(row, tree, may, kept, mass) if level < AdaptiveTree.LEVELS else {}
            best.append(max(rates.values(), default=0.0))
            stops.append(stop)
            decided = stop if count == 0 else rates[count]
            waits = level == 0 and plain.lost < plain.fill  # a deferred prompt is not paid for yet
            assert waits or decided >= (1 - 1e-6) * max(stop, best[-1])
            assert not (waits and count)
            if count:  # the most probable of those that may be expanded
                expanded = trimmed(chosen[row].tolist())
                assert min(tree.scores[node] for node in expanded) >= max(
                    (tree.scores[node] for node in may if node not in expanded), default=-math.inf
                )
        if level == 0 and chosen is None and best[0] > stops[0]:
            plain.lost += 1 / stops[0] - 1 / best[0]
        if any(counts):
            plain.fill = 0.0
            plain.spent += plain.costs.draft[max(counts)]
        level += 1

    nodes, selected = drafted(policy, children, rows, room, watch)
    taken = nodes.take(selected)
    for tree in as_lists(taken):
        assert len(tree.drafted) <= plain.costs.most
        assert max(tree.depths[node] for node in tree.drafted) <= room
    return taken


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
    policy, plain = AdaptiveTree(costs, width), PlainAdaptive(costs)
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
        taken = check_step(policy, plain, any_children(f"{random.random()} {step}", width), rows, room)
        trees = as_lists(taken)
        accepted = [random.randint(0, max(tree.depths[node] for node in tree.drafted)) for tree in trees]
        policy.learn(taken, torch.tensor(accepted).numpy())
        plain.learn(trees, accepted)


def adaptive(costs, width=1, deferred_tokens=0):
    """The policy of a single row."""
    policy = AdaptiveTree(costs, width)
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
        nodes, selected = drafted(policy, lambda row, path: [0.9])
        sizes.append(selected.shape[1] - 1)
        policy.learn(nodes.take(selected), torch.zeros(1, dtype=torch.long).numpy())
    assert sizes[0] > 0
    assert 0 in sizes, "drafts that are never accepted must end"
    assert any(later > 0 for later in sizes[sizes.index(0) :]), "and be tried again"
    assert sum(size > 0 for size in sizes) < len(sizes) / 2


def test_a_deferred_prompt_enters_the_twig_when_as_many_seconds_were_lost():
    policy, plain = adaptive(step_costs(fill=1.0), deferred_tokens=30), PlainAdaptive(step_costs(fill=1.0))
    plain.join(1, 30)
    steps = 0
    while not (drafted_now := len(as_lists(check_step(policy, plain, lambda row, path: [0.9], 1))[0].drafted) - 1):
        steps += 1
        assert steps < 50
    assert steps > 2
    assert drafted_now > 0
    assert plain.lost >= 30.0
    assert size(policy, [0.9]) > 0, "once it is in, nothing holds drafts back"


def test_rows_are_trusted_for_themselves():
    """One row's drafts are accepted, another's are not; a third leaves, and neither is taken for the other."""

    def settled(leaving):
        policy = AdaptiveTree(step_costs(draft=4.0, per_node=0.1), 1)
        policy.join(3, 0)
        for _ in range(4):
            nodes, selected = drafted(policy, lambda row, path: [0.9], rows=3)
            taken = nodes.take(selected)
            policy.learn(taken, torch.tensor([0, int(taken.valid[1].sum()) - 1, 0]).numpy())
        policy.leave(leaving)
        nodes, selected = drafted(policy, lambda row, path: [0.9], rows=2)
        return (nodes.take(selected).valid.sum(dim=1) - 1).tolist()

    first, second = settled(leaving=0)  # the last row stands where the first one stood
    assert first < second
    first, second = settled(leaving=2)
    assert first < second
    first, second = settled(leaving=1)
    assert first == second
