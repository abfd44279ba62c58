"""Tokens that have high scores and differ: the choice against determinants, and answers under it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.batches import batched
from tests.pruning.trunks import PROMPTS, WAYS, grown
from tests.tiny import VISUAL, prompt
from twigvlm import TwigVLMError
from twigvlm.evaluation.variants import answer_all, make_variants
from twigvlm.pruning.select import best, diverse

ALL = torch.ones(1, 8, dtype=torch.bool)


def chosen(scores, states, keep, visual=ALL):
    return diverse(scores[None], states[None], visual[:, : len(scores)], [keep])[0].nonzero()[:, 0].tolist()


@given(st.integers(0, 2**31 - 1), st.integers(2, 8), st.integers(2, 12))
def test_each_token_adds_most_to_the_product_of_scores_and_determinant(seed, count, width):
    """One token more at each size, and no other would have made the determinant larger."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, generator=generator) + 0.05
    states = torch.randn(count, width, generator=generator)
    directions = torch.nn.functional.normalize(states.double(), dim=-1)
    # Not quite the cosines alone: a thousandth on the diagonal gives an order among tokens that the chosen ones span.
    cosines = directions @ directions.T + 1e-3 * torch.eye(count)

    def worth(tokens):
        return float(scores[tokens].double().log().sum() + torch.logdet(cosines[tokens][:, tokens]))

    before = []
    for keep in range(1, count + 1):
        now = chosen(scores, states, keep)
        assert len(now) == keep
        assert set(before) < set(now)
        others = [worth([*before, other]) for other in range(count) if other not in before]
        assert worth(now) == pytest.approx(max(others), abs=1e-2)
        before = now


@given(st.integers(0, 2**31 - 1), st.integers(1, 8), st.booleans())
def test_scores_decide_where_all_tokens_are_alike_or_all_differ_fully(seed, keep, alike):
    scores = torch.rand(8, generator=torch.Generator().manual_seed(seed)) + 0.05
    states = torch.ones(8, 8) if alike else torch.eye(8)
    assert chosen(scores, states, keep) == best(scores[None], states[None], ALL, [keep])[0].nonzero()[:, 0].tolist()


def test_of_twins_one_stays():
    states = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert chosen(torch.tensor([0.5, 0.4, 0.1]), states, 2) == [0, 2]


def test_rows_choose_alone_and_text_is_never_chosen():
    scores, states = torch.rand(3, 8), torch.randn(3, 8, 4)
    visual = torch.tensor([[True] * 6 + [False] * 2, [False] * 3 + [True] * 5, [False] * 8])
    together = diverse(scores, states, visual, [3, 5, 0])
    assert together.sum(dim=1).tolist() == [3, 5, 0]
    assert not (together & ~visual).any()
    for row, keep in enumerate((3, 5, 0)):
        part = slice(row, row + 1)
        assert torch.equal(diverse(scores[part], states[part], visual[part], [keep]), together[part])


@pytest.mark.parametrize("scores", [torch.zeros(8), torch.full((8,), float("nan"))])
def test_scores_that_say_nothing_leave_a_choice(scores):
    assert len(chosen(scores, torch.randn(8, 4), 5)) == 5


@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_drafts_and_batches_change_nothing(way, scout):
    model = grown(pruning_head=True)
    options = {"keep": 6, "diverse": True, "scout": scout, "max_new_tokens": 8, "return_dict_in_generate": True}
    plain = [model.generate(**inputs, **options) for inputs in PROMPTS]
    together, width = model.generate(**batched(PROMPTS), **options, **WAYS[way]), batched(PROMPTS)["input_ids"].shape[1]
    for row, alone in enumerate(plain):
        length = PROMPTS[row]["input_ids"].shape[1]
        assert torch.equal(together.kept_indices[row] - (width - length), alone.kept_indices[0])
        assert torch.equal(together.sequences[row, width:], alone.sequences[0, length:])


def test_scouting_keeps_what_the_cut_after_the_trunk_keeps():
    model = grown(pruning_head=True)
    options = {"keep": 6, "diverse": True, "max_new_tokens": 1, "return_dict_in_generate": True}
    for inputs in PROMPTS:
        after_trunk, before = (model.generate(**inputs, **options, scout=scout) for scout in (False, True))
        assert torch.equal(after_trunk.kept_indices[0], before.kept_indices[0])


def test_keeping_everything_is_the_base():
    model = grown()
    pruned = model.generate(**prompt(), keep=VISUAL, diverse=True, max_new_tokens=8)
    with model.disabled():
        assert torch.equal(pruned, model.generate(**prompt(), max_new_tokens=8, do_sample=False))


def test_evaluation_asks_as_generate_does():
    model = grown()
    (_, variant) = make_variants(model, ["diverse"], [8])
    outcome = answer_all(model, prompt(), [variant], 8)[variant.name]
    answer = model.generate(**prompt(), retain=8, diverse=True, max_new_tokens=8)
    assert outcome.ids == answer[0, prompt()["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diverse": True}, "diverse=True: needs a budget; give retain or keep too"),
        ({"diverse": True, "keep": 4, "retain_per_image": True}, "give only one of them"),
        ({"diverse": True, "retain": 8, "pruner": "random:0"}, "diverse: belongs to the twig's own pruning"),
    ],
)
def test_refused(options, message):
    with pytest.raises(TwigVLMError, match=message):
        grown().generate(**prompt(), max_new_tokens=2, **options)
