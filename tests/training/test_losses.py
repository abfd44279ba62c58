"""Divergences, advantages and the policy's loss by their properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twigvlm.training.losses import advantages, attention_loss, divergence, policy_loss, prediction_loss

logits = st.lists(st.floats(-50, 50), min_size=5, max_size=5).map(torch.tensor)


@given(logits, logits)
def test_divergence_is_zero_only_between_equals(one, other):
    target, prediction = one.double().log_softmax(0), other.double().log_softmax(0)
    assert float(divergence(target, target)) == 0
    value = float(divergence(target, prediction))
    assert value >= -1e-12
    distance = float((target.exp() - prediction.exp()).abs().sum())
    assert value >= distance**2 / 2 - 1e-9  # Pinsker


@given(logits, st.integers(0, 4))
def test_divergence_is_finite_where_the_target_is_zero(values, zero):
    target = values.index_fill(0, torch.tensor([zero]), float("-inf")).log_softmax(0)
    prediction = values.flip(0).requires_grad_()
    value = divergence(target, prediction.log_softmax(0))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(prediction.grad).all()


@given(logits, logits, st.floats(1, 8), st.floats(0.01, 4))
def test_predictions_are_softened_scaled_and_clipped(teacher, student, temperature, clip):
    target, prediction = (values.double() / temperature for values in (teacher, student))
    plain = torch.nn.functional.kl_div(prediction.log_softmax(0), target.softmax(0), reduction="sum")
    loss = prediction_loss(teacher[None], student[None], temperature, clip)
    assert loss.tolist() == pytest.approx([min(float(plain) * temperature**2, clip) / clip], rel=1e-3, abs=1e-4)


@given(logits, logits, st.floats(1, 8), st.floats(0.01, 4))
def test_a_clipped_token_has_its_own_gradient_scaled_to_the_clip(teacher, student, temperature, clip):
    student = student.double().requires_grad_()
    soft = ((values / temperature).log_softmax(0) for values in (teacher.double(), student))
    plain = divergence(*soft) * temperature**2
    (expected,) = torch.autograd.grad(plain, student)
    (got,) = torch.autograd.grad(prediction_loss(teacher[None], student[None], temperature, clip).sum(), student)
    scale = clip / max(float(plain.detach()), clip)
    torch.testing.assert_close(got, expected * scale / clip, rtol=1e-3, atol=1e-4)


def test_a_token_beyond_the_clip_teaches_and_counts_no_more_than_one_at_it():
    student = torch.tensor([[9.0, 0.0], [0.1, 0.0]], requires_grad=True)
    losses = prediction_loss(torch.tensor([[0.0, 90.0], [0.0, 0.0]]), student, 1.0, 4.0)
    losses.sum().backward()
    assert float(losses[0].detach()) == 1
    assert student.grad[0, 1] < 0 < student.grad[0, 0]


def test_attention_is_the_mean_over_real_queries():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 2, 4).log_softmax(-1), torch.randn(2, 2, 4).log_softmax(-1)
    visible = torch.ones(2, 2, 4, dtype=torch.bool)
    visible[1, 1] = False
    hidden = [row.masked_fill(~visible, float("-inf")) for row in (teacher, student)]
    rows = divergence(teacher, student)
    torch.testing.assert_close(attention_loss(*hidden), (rows[0].sum() + rows[1, 0]) / 3)
    first = torch.tensor([[True, False], [False, True]])
    torch.testing.assert_close(attention_loss(*hidden, first), rows[0, 0])  # the other one sees nothing
    nothing = torch.full_like(teacher, float("-inf"))
    assert attention_loss(nothing, nothing) == 0


def test_a_teacher_who_sees_less_than_the_student_has_a_finite_gradient():
    """A sliding window of the base is not the P-Head's."""
    torch.manual_seed(0)
    teacher = torch.randn(1, 2, 4)
    teacher[0, 0, :2] = float("-inf")
    teacher[0, 1] = float("-inf")
    scores = torch.randn(1, 2, 4, requires_grad=True)
    attention_loss(teacher.log_softmax(-1).nan_to_num(float("-inf")), scores.log_softmax(-1)).backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0, 0].any()
    assert not scores.grad[0, 1].any()


@given(st.lists(st.floats(-20, 0), min_size=2, max_size=8).map(torch.tensor))
def test_advantages_have_no_mean(rewards):
    values = advantages(rewards)
    assert torch.isfinite(values).all()
    assert abs(float(values.sum())) < 1e-3
    if rewards.std() > 1e-3:
        assert float(values.std()) == pytest.approx(1, abs=1e-3)


@given(st.floats(-30, 0), st.integers(2, 40))
def test_a_group_without_spread_teaches_nothing(reward, group):
    log_probabilities = torch.randn(group, requires_grad=True)
    policy_loss(log_probabilities, advantages(torch.full((group,), reward))).backward()
    assert not log_probabilities.grad.any()
