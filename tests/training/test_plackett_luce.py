"""Ordered draws without replacement: exact on small sizes, and safe where mass runs out."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.training.losses import advantages, policy_loss
from twigvlm.training.plackett_luce import first_draw_entropy, log_probability, sample


def naive(scores, action):
    """Eq. 13 as printed, in float64."""
    probability, left = 1.0, 1.0
    for token in action:
        probability *= float(scores[token]) / left
        left -= float(scores[token])
    return probability


@pytest.mark.parametrize(("visual", "keep"), [(4, 1), (4, 2), (4, 4), (5, 3), (6, 5)])
def test_all_ordered_draws_sum_to_one(visual, keep):
    torch.manual_seed(visual * keep)
    log_scores = torch.randn(visual, dtype=torch.float64).log_softmax(0)
    actions = torch.tensor(list(permutations(range(visual), keep)))
    assert float(log_probability(log_scores, actions).exp().sum()) == pytest.approx(1, abs=1e-12)


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6), st.permutations(range(6)), st.integers(1, 5))
def test_it_is_the_product_of_shares(values, order, keep):
    scores = torch.tensor(values, dtype=torch.float64).softmax(0)
    value = log_probability(scores.log(), torch.tensor([order[:keep]])).exp()
    assert float(value) == pytest.approx(naive(scores, order[:keep]), rel=1e-9)


def test_mass_may_run_out():
    log_scores = torch.tensor([0.0, -200.0, -201.0, -300.0, -301.0]).log_softmax(0).requires_grad_()
    for keep in (3, 4, 5):  # after the first draw nothing is left in float32
        value = log_probability(log_scores, torch.arange(keep)[None])
        (gradient,) = torch.autograd.grad(value.sum(), log_scores)
        assert torch.isfinite(gradient).all()
        exact = log_probability(log_scores.detach().double(), torch.arange(keep)[None])
        assert value.item() == pytest.approx(exact.item(), abs=1e-3)
        assert -1.0 < value.item() < 0.0


def test_long_draws_are_exact_in_float32():
    torch.manual_seed(0)
    log_scores = (5 * torch.randn(576)).log_softmax(0)
    actions = sample(log_scores, 4, 570, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        log_probability(log_scores, actions).double(),
        log_probability(log_scores.double(), actions),
        rtol=1e-5,
        atol=1e-2,
    )


def test_draws_follow_the_distribution():
    log_scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    count = 40_000
    actions = sample(log_scores, count, 2, torch.Generator().manual_seed(0))
    pairs = torch.tensor(list(permutations(range(4), 2)))
    expected = count * log_probability(log_scores, pairs).exp()
    seen = (actions[:, None] == pairs).all(dim=-1).sum(dim=0)
    assert int(seen.sum()) == count  # never a token twice
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_a_seed_draws_the_same():
    scores = torch.zeros(9).log_softmax(0)
    draws = [sample(scores, 3, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_entropy():
    assert float(first_draw_entropy(torch.zeros(8).log_softmax(0))) == pytest.approx(2.0794, abs=1e-3)


def test_reinforcement_finds_the_token_that_pays():
    weights = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    paid = []
    for _ in range(60):
        log_scores = weights.log_softmax(0)
        actions = sample(log_scores.detach(), 16, 2, generator)
        rewards = (actions == 3).any(dim=1).float()
        paid.append(float(rewards.mean()))
        optimizer.zero_grad()
        policy_loss(log_probability(log_scores, actions), advantages(rewards)).backward()
        optimizer.step()
    assert sum(paid[:5]) / 5 < 0.5
    assert sum(paid[-5:]) / 5 > 0.9
    assert int(weights.argmax()) == 3
