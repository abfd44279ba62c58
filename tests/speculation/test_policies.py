"""Policies: what they expand and what they have verified, against plain Python over lists."""

import math
import random as rng
from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.speculation.forests import PlainTree, as_lists, trimmed
from tests.twigs import MAX_NODES, step_costs
from twigvlm.config import SpeculationConfig
from twigvlm.speculation.adaptive_tree import AdaptiveTree
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.nodes import INVALID, Nodes
from twigvlm.speculation.policies import Chain, FixedTree

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
    """Probabilities of children that differ from path to path, the best one first, as a twig's are."""

    def children(row, path):
        random = rng.Random(f"{seed} {row} {path}")
        shares = sorted((random.uniform(0.05, 1.0) for _ in range(width)), reverse=True)
        total = sum(shares) + random.uniform(0.0, 0.5)
        return [share / total for share in shares]

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
        for count in range(1, min(max(map(len, best)), self.costs.most) + 1):
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
        for count in range(1, min(max(map(len, best)), self.costs.most) + 1):
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
                if size > self.costs.most:
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
        assert len(tree.drafted) <= plain.costs.most
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
        taken, late = check_step(policy, plain, any_children(f"{random.random()} {step}", width), rows, room)
        trees = as_lists(taken)
        accepted = [random.randint(0, max(tree.depths[node] for node in tree.drafted)) for tree in trees]
        policy.learn(torch.tensor(accepted).numpy())
        plain.learn(trees, accepted, late)


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
        policy = AdaptiveTree(step_costs(draft=4.0, per_node=0.1), 1)
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
