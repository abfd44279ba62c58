"""The base's choices for the rows of a batch: greedy, processed, sampled, each row as if it were alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.speculation.forests import TOKENS, levels, planted, randoms
from twigvlm.base.prompt import Prompt
from twigvlm.engine.noise import Noise
from twigvlm.engine.row import Request, Row
from twigvlm.engine.sampling import Chooser
from twigvlm.speculation.walk import walk

CPU = torch.device("cpu")
IDS = [7, 8]
PROMPT = Prompt(
    torch.zeros(1, 2, 4), torch.arange(2)[None], torch.zeros(1, 2, dtype=torch.bool), torch.tensor([IDS]), (2,)
)


def request_of(*answers, processors=None, noises=None):
    """The rows of a request, with what they have been answered so far."""
    request = Request(torch.tensor([IDS] * len(answers)), [0] * len(answers), processors)
    for index, tokens in enumerate(answers):
        noise = None if noises is None else noises[index]
        request.rows.append(Row(request, PROMPT, index, None, (), 50, frozenset(), noise, tokens=list(tokens)))
    return request.rows


def noise_of(seed, temperature=1.0, vocabulary=TOKENS):
    return Noise(temperature, vocabulary, CPU, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("others", [0, 1])
def test_a_generator_is_rewound_only_if_nobody_else_has_drawn_from_it(others):
    generator, alone = (torch.Generator().manual_seed(3) for _ in range(2))
    noise = Noise(1.0, TOKENS, CPU, generator)
    noise.at(4)
    seen = torch.rand(others, generator=generator)
    noise.close(2)
    first = Noise(1.0, TOKENS, CPU, alone)
    following = first.at(2) if not others else (first.at(4), torch.rand(1, generator=alone), first.at(5))[2]
    assert torch.equal(torch.empty(TOKENS).exponential_(1, generator=generator), following)
    assert len(seen) == others


class Seeing:
    """Processors that change nothing, or what they are told to, and remember what they saw."""

    has_state = True

    def __init__(self, needs_ids=True, needs_lockstep=False, change=lambda scores: scores):
        self.needs_ids, self.needs_lockstep, self.change, self.seen = needs_ids, needs_lockstep, change, []

    def on_scores(self, scores):
        assert not self.needs_ids
        return self.change(scores)

    def on_row(self, row, ids, scores):
        assert self.needs_ids
        assert scores.dtype == torch.float32
        self.seen.append((row, ids[0].tolist()))
        return self.change(scores)

    def on_batch(self, ids, scores, unfinished):
        assert self.needs_lockstep
        self.seen.append((ids.tolist(), scores.clone(), list(unfinished)))
        return self.change(scores)


def walked(nodes, trees, logits, rows):
    """Of each row, the accepted path and the base's choices along it."""
    chooser, depth = Chooser(rows, CPU), max(max(tree.depths) for tree in trees)
    accepted = walk(nodes, depth, chooser.choose(logits), chooser.go_on if chooser.stops_early else None)
    counts = accepted.counts.tolist()
    parts = zip(accepted.path.tolist(), accepted.tokens.tolist(), counts, strict=True)
    return [(path[:count], tokens[:count]) for path, tokens, count in parts]


def any_logits(trees, random):
    generator = torch.Generator().manual_seed(random.randrange(2**16))
    return torch.randn(len(trees), len(trees[0].tokens), TOKENS, generator=generator)


@given(levels, randoms)
def test_processors_see_each_accepted_position_once_and_no_other(levels, random):
    nodes, trees = planted(3, levels, random)
    logits = any_logits(trees, random)
    greedy = walked(nodes, trees, logits, request_of([1], [2, 3], [4]))
    for row, (path, choices) in enumerate(greedy):
        assert choices == [int(logits[row, node].argmax()) for node in path]
    pair, single = Seeing(), Seeing()
    rows = [*request_of([1], [2, 3], processors=pair), *request_of([4], processors=single)]
    assert walked(nodes, trees, logits, rows) == greedy
    for row, (seen, place) in enumerate([(pair.seen, 0), (pair.seen, 1), (single.seen, 0)]):
        path = greedy[row][0]
        expected = [[*IDS, *rows[row].tokens, *trees[row].path_tokens(node)] for node in path]
        assert [ids for which, ids in seen if which == place] == expected


@given(levels, randoms)
def test_processors_of_half_precision_logits_work_in_single_precision(levels, random):
    nodes, trees = planted(1, levels, random)
    half = any_logits(trees, random).half()
    assert walked(nodes, trees, half, request_of([], processors=Seeing())) == walked(nodes, trees, half, request_of([]))


@pytest.mark.parametrize("needs_ids", [True, False])
@given(levels, randoms)
def test_processors_change_choices_but_not_the_logits(needs_ids, levels, random):
    nodes, trees = planted(2, levels, random)
    logits = any_logits(trees, random)
    before = logits.clone()
    processors = Seeing(needs_ids, change=lambda scores: scores.index_fill_(-1, torch.tensor([0, 3]), -9.0))
    forbidden = logits.index_fill(-1, torch.tensor([0, 3]), -9.0)
    expected = walked(nodes, trees, forbidden, request_of([], []))
    assert walked(nodes, trees, logits, request_of([], [], processors=processors)) == expected
    assert torch.equal(logits, before)


@given(levels, randoms)
def test_rows_in_lockstep_are_seen_at_one_position(levels, random):
    nodes, trees = planted(3, levels, random)
    logits = any_logits(trees, random)
    processors = Seeing(needs_lockstep=True)
    first, last = request_of([1], [2], processors=processors)
    rows = [first, *request_of([3]), last]
    alone = walked(nodes, trees, logits, request_of([1], [3], [2]))
    got = walked(nodes, trees, logits, rows)
    together = min(len(alone[0][0]), len(alone[2][0]))
    assert got[1] == alone[1]
    assert [(path, choices) for path, choices in (got[0], got[2])] == [
        (path[:together], choices[:together]) for path, choices in (alone[0], alone[2])
    ]
    assert len(processors.seen) == together
    for step, (ids, scores, unfinished) in enumerate(processors.seen):
        at = [got[row][0][step] for row in (0, 2)]
        assert ids == [
            [*IDS, *rows[row].tokens, *trees[row].path_tokens(node)] for row, node in zip((0, 2), at, strict=True)
        ]
        assert torch.equal(scores, torch.stack([logits[row, node] for row, node in zip((0, 2), at, strict=True)]))
        assert unfinished == [0, 1]


@given(levels, randoms)
def test_a_sampled_choice_does_not_depend_on_the_draft(levels, random):
    """Whatever was drafted, the token at a place of the answer is the one that its noise picks from its scores alone."""
    nodes, trees = planted(3, levels, random)
    logits = any_logits(trees, random)
    answers = [1], [2, 3, 0], [4]
    rows = [
        *request_of(*answers[:2], noises=[noise_of(1), noise_of(2)]),
        *request_of(answers[2], noises=[noise_of(3)]),
    ]
    for row, (path, choices) in enumerate(walked(nodes, trees, logits, rows)):
        noise = noise_of(row + 1)
        drawn = [noise.at(len(answers[row]) + depth) for depth in range(len(path))]
        shares = [logits[row, node].softmax(-1) for node in path]
        assert choices == [int((share / each).argmax()) for share, each in zip(shares, drawn, strict=True)]


@given(randoms, st.booleans())
def test_drafts_rank_by_the_noise_that_the_base_will_choose_with(random, reduced):
    answers, seeds, temperature = ([1, 2], [], [3]), (4, 5), 0.7
    token_ids = torch.tensor([5, 0, 3, 2]) if reduced else None
    logits = torch.randn(3, 2, 4 if reduced else 6, generator=torch.Generator().manual_seed(random.randrange(2**16)))
    depths = torch.tensor([[random.randint(0, 3) for _ in range(2)] for _ in range(3)])
    sampled = request_of(*answers[:2], noises=[noise_of(seed, temperature, 6) for seed in seeds])
    chooser = Chooser([*sampled, *request_of(answers[2])], CPU)
    scores = chooser.rescore(logits, depths, 3, token_ids)
    for row, seed in enumerate(seeds):
        noise = noise_of(seed, temperature, 6)
        drawn = torch.stack([noise.at(len(answers[row]) + depth) for depth in range(4)])
        drawn = drawn if token_ids is None else drawn[:, token_ids]
        noisy = (logits[row] / temperature).softmax(-1) / drawn[depths[row]]
        torch.testing.assert_close(scores[row].exp(), noisy / noisy.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(scores[2], logits[2].log_softmax(-1))


def test_noise_is_drawn_in_order_and_kept_until_it_is_of_no_use():
    first, second = noise_of(2), noise_of(2)
    ahead = first.at(3)
    drawn = [second.at(place) for place in range(4)]
    assert torch.equal(ahead, drawn[3])
    assert torch.equal(first.at(1), drawn[1])
    first.forget(2)
    assert torch.equal(first.at(2), drawn[2])
    with pytest.raises(KeyError):
        first.at(1)


@pytest.mark.parametrize("drawn", [1, 4, 9])
def test_an_ended_answer_gives_back_what_was_drawn_beyond_it(drawn):
    generator, expected = (torch.Generator().manual_seed(6) for _ in range(2))
    noise, plain = Noise(1.0, TOKENS, CPU, generator), Noise(1.0, TOKENS, CPU, expected)
    noise.at(drawn)
    noise.close(1)
    plain.at(0)
    assert torch.equal(generator.get_state(), expected.get_state())
