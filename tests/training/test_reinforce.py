"""Stage 2: what learns and what does not, from which samples, and under which budgets."""

import pytest
import torch
from transformers import TrainerCallback

from tests.training.conversations import ask
from tests.training.events import logged
from tests.training.stage2 import BUDGETS, run, settings
from tests.training.stop import StopAt
from tests.training.weights import copy
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import solve_keep
from twigvlm.training import options
from twigvlm.training.data.dataset import Collator, ConversationDataset
from twigvlm.training.options import Stage2Config
from twigvlm.training.reinforce import Policy, budget_probabilities


def test_the_p_head_learns_and_nothing_else(make_policy, dataset, tmp_path):
    model = make_policy()
    base, twig = copy(model.model), copy(model.twig)
    log = run(model, dataset, tmp_path, max_steps=2, gamma=(0.0, 0.0))
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.model.state_dict().items())
    changed = {name for name, tensor in model.twig.state_dict().items() if not torch.equal(tensor, twig[name])}
    assert changed == {"pruning_head.query_gate.weight", "pruning_head.key_gate.weight"}
    assert all(parameter.requires_grad for parameter in model.twig.parameters())
    assert log[0].keys() >= {"loss", "reward", "reward_spread", "advantage_spread", "entropy", "retain"}
    assert {entry["retain"] for entry in log[:2]} <= set(BUDGETS)


def test_a_bfloat16_base_trains_a_float32_p_head(make_policy, dataset, tmp_path):
    model = make_policy(torch.bfloat16)
    twig = copy(model.twig)
    log = run(model, dataset, tmp_path, max_steps=2)
    assert log[0]["attention_kl"] > 0
    changed = {name for name, tensor in model.twig.state_dict().items() if not torch.equal(tensor, twig[name])}
    assert changed == {"pruning_head.query_gate.weight", "pruning_head.key_gate.weight"}
    assert model.twig.norm.weight.dtype == torch.bfloat16


def test_equal_rewards_give_no_gradient(make_policy, dataset):
    model = make_policy()
    policy = Policy(model, settings(budgets=(12.0 + 5 / 6,), gamma=(0.0, 0.0)), 10)  # R = M - 1 ... M
    assert policy.keep(policy.levels[0], 16) == 15
    every = Policy(model, settings(budgets=(16 * 5 / 6,), gamma=(0.0, 0.0)), 10)
    assert every.keep(every.levels[0], 16) == 16
    every(**dataset[0], step=0, part=0)["loss"].backward()
    for linear in (model.twig.pruning_head.query_gate, model.twig.pruning_head.key_gate):
        assert not linear.weight.grad.any()
    policy(**dataset[0], step=0, part=0)["loss"].backward()
    assert model.twig.pruning_head.key_gate.weight.grad.any()


def test_a_sample_without_an_image_teaches_nothing(make_policy, dataset):
    model = make_policy()
    policy = Policy(model, settings(), 10)
    text = {"input_ids": torch.arange(3, 13)[None], "labels": torch.full((1, 10), -100)}
    text["labels"][0, 6:] = text["input_ids"][0, 6:]
    terms = policy(**text, step=0, part=0)
    terms["loss"].backward()
    assert terms["loss"].item() == 0
    assert not model.twig.pruning_head.key_gate.weight.grad.any()


def test_samples_weigh_the_same_beside_those_that_teach_nothing(make_policy, dataset):
    model, text = make_policy(), {"input_ids": torch.arange(3, 13)[None], "labels": torch.full((1, 10), -100)}
    text["labels"][0, 6:] = text["input_ids"][0, 6:]
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    policy = Policy(model, settings(budgets=(5.0,)), 10)
    gradients = []
    for items in ([dataset[0]], [dataset[0], text, text, text]):
        model.twig.zero_grad()
        terms = policy(**Collator(pad_token_id=0)(items), step=0, part=0)
        assert float(terms["taught"]) == 1 / len(items)
        terms["loss"].backward()
        gradients.append(model.twig.pruning_head.key_gate.weight.grad.clone())
    torch.testing.assert_close(4 * gradients[1], gradients[0], rtol=1e-3, atol=1e-7)


def test_a_sample_that_cannot_have_the_budget_teaches_nothing(make_policy, dataset):
    model = make_policy()
    policy = Policy(model, settings(budgets=(2.0,), gamma=(0.0, 0.0)), 10)
    assert policy.keep(2.0, 16) is None
    terms = policy(**dataset[0], step=0, part=0)
    terms["loss"].backward()
    assert float(terms["taught"]) == 0
    assert not model.twig.pruning_head.key_gate.weight.grad.any()


def test_resumed_equals_uninterrupted(make_policy, dataset, tmp_path):
    options = {"max_steps": 3, "batch_size": 2, "accumulate": 2, "save_steps": 1}
    whole = make_policy()
    run(whole, dataset, tmp_path / "whole", **options)
    run(make_policy(), dataset, tmp_path / "parts", callbacks=[StopAt(2)], **options)
    resumed = make_policy()
    torch.manual_seed(123)
    log = run(resumed, dataset, tmp_path / "parts", resume=True, **options)
    assert max(entry["step"] for entry in log) == 3
    after = copy(resumed.twig)
    assert all(torch.equal(tensor, after[name]) for name, tensor in copy(whole.twig).items())


def test_rewards_rise(make_policy, dataset, tmp_path):
    """On one question, with prunings of few tokens: the policy finds those that the base answers with best."""
    model = make_policy()
    one = torch.utils.data.Subset(dataset, [0])
    log = run(
        model, one, tmp_path, max_steps=20, batch_size=1, group=16, budgets=(4.0,), gamma=(0.0, 0.0), learning_rate=5e-2
    )
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    spread = sum(entry["reward_spread"] for entry in log[:5]) / 5
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + spread


def test_a_run_goes_on_from_the_twig_that_it_began_with_only(make_policy, dataset, tmp_path):
    run(make_policy(), dataset, tmp_path, max_steps=1)
    other, trained = make_policy(), make_policy()
    with torch.no_grad():
        other.twig.norm.weight.mul_(1.5)
    trained.twig.record.append({"stage": "stage1"})
    for twig in (other, trained):
        with pytest.raises(
            TwigVLMError, match=r"start=.*: the checkpoint in .* was trained with .*; resume with the same"
        ):
            run(twig, dataset, tmp_path, resume=True, max_steps=1)


def test_an_interrupted_run_goes_on_with_the_same_model(make_policy, dataset, tmp_path):
    model = make_policy()
    model.twig.record.append({"stage": "stage1"})

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    options = {"max_steps": 3, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run(model, dataset, tmp_path, callbacks=[Interrupt()], **options)
    run(model, dataset, tmp_path, resume=True, **options)
    assert [entry.get("steps") for entry in model.twig.record] == [None, 3]


def test_attention_weighs_little_at_the_lowest_budget_and_much_at_the_highest(make_policy, dataset):
    """The weight of L_AttnKL rises with R from the first of `gamma` to the second."""
    model, levels, gamma, seen = make_policy(), (4, 7, 10), (0.5, 3.0), {}
    options = {"budgets": None, "keep_budgets": levels, "beta": 0.0}
    without, policy = (Policy(model, settings(**options, gamma=each), 10) for each in ((0.0, 0.0), gamma))
    for step in range(10):
        terms = policy(**dataset[0], step=step, part=0)
        rest = without(**dataset[0], step=step, part=0)["loss"]
        seen[float(terms["keep"])] = float((terms["loss"] - rest).detach() / terms["attention_kl"])
    assert seen == pytest.approx({4.0: 0.5, 7.0: 1.75, 10.0: 3.0}, rel=1e-3)


@pytest.mark.parametrize("count", [1, 7])
def test_budgets_are_uniform_at_first_and_hardest_at_the_end(count):
    torch.testing.assert_close(budget_probabilities(count, 0.0, 8.0, 2.0), torch.full((count,), 1 / count).double())
    last = budget_probabilities(count, 1.0, 8.0, 2.0)
    assert float(last[0]) > 0.999
    middle = budget_probabilities(3, 0.5, 8.0, 2.0)
    torch.testing.assert_close((middle[1:] / middle[:-1]).log(), torch.full((2,), -2.0).double())


def test_budgets_are_kept_tokens_or_averages(make_policy, dataset, tmp_path):
    log = run(make_policy(), dataset, tmp_path, max_steps=4, budgets=None, keep_budgets=(4, 9), beta=0.0)
    entries = [entry for entry in log if "keep" in entry]
    assert {entry["keep"] for entry in entries} == {4.0, 9.0}
    for entry in entries:  # R̄ of 16 visual tokens, 6 layers, K = 1 and K_f = 5
        assert entry["retain"] == pytest.approx((16 + entry["keep"] * 4) / 6)
    assert {entry["keep"] for entry in run(make_policy(), dataset, tmp_path / "2", max_steps=4)[:4]} <= {4.0, 10.0}


def test_the_published_budgets_stand_where_none_are_given(make_policy):
    published = (41, 72, 103, 134, 165, 196, 227)
    assert Stage2Config().resolve().keep_budgets == published
    assert Stage2Config(budgets=(48.0,)).resolve() == Stage2Config(budgets=(48.0,))
    policy = Policy(make_policy(), Stage2Config(), 10)
    assert [policy.keep(level, 576) for level in policy.levels] == list(published)
    assert [policy.keep(level, 144) for level in policy.levels] == [*published[:4], None, None, None]
    averages = (64, 128, 192)  # of LLaVA-1.5 (Table 7)
    assert [solve_keep(retain, 576, 32, 2, 24) for retain in averages] == [41, 134, 227]


def test_the_record_says_which_budgets_were_drawn(make_policy, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "KEEP_BUDGETS", (3, 8))
    model = make_policy()
    run(model, dataset, tmp_path, max_steps=1, budgets=None)
    assert model.twig.record[0]["settings"]["keep_budgets"] == (3, 8)
    with pytest.raises(TwigVLMError, match=r"keep_budgets=.*4.*: the checkpoint in .* was trained with"):
        run(make_policy(), dataset, tmp_path, resume=True, max_steps=1, budgets=None, keep_budgets=(4,))


def test_what_cannot_be_trained_is_refused(make_model, make_policy, dataset, tmp_path):
    with pytest.raises(TwigVLMError, match="no P-Head to train"):
        run(make_model(), dataset, tmp_path / "out")
    with pytest.raises(TwigVLMError, match="budgets=1 2: none is possible for the first sample with a picture, of 16"):
        run(make_policy(), dataset, tmp_path / "out", budgets=(1.0, 2.0))
    with pytest.raises(
        TwigVLMError,
        match=r"keep_budgets=41 .* 227: none is possible for the first sample with a picture, of 16 visual",
    ):
        run(make_policy(), dataset, tmp_path / "out", budgets=None)
    with pytest.raises(
        TwigVLMError,
        match=r"keep_budgets=16 20: none prunes the first sample with a picture, of 16 visual tokens; choose others",
    ):
        run(make_policy(), dataset, tmp_path / "out", budgets=None, keep_budgets=(16, 20))
    assert not (tmp_path / "out").exists()


def test_samples_without_pictures_do_not_hide_that_nothing_can_be_learnt(make_policy, samples, processor, tmp_path):
    text = ask("What?", "That.")
    with pytest.raises(TwigVLMError, match="none is possible for the first sample with a picture, of 16 visual tokens"):
        run(make_policy(), ConversationDataset([text, *samples], processor), tmp_path / "out", budgets=(1.0, 2.0))
    with pytest.raises(TwigVLMError, match="no sample has a picture; add some"):
        run(make_policy(), ConversationDataset([text] * 4, processor), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"group": 1}, {"chunk": 0}, {"span": 0}, {"budgets": ()}, {"budgets": (5.0, 4.0)}, {"beta": -1.0}, {"power": 0.0},
        {"gamma": (1.0, -1.0)}, {"batch_size": 0}, {"keep_budgets": ()}, {"keep_budgets": (5, 4)}, {"keep_budgets": (0, 4)},
        {"budgets": (5.0,), "keep_budgets": (5,)},
    ],
)  # fmt: skip
def test_settings_are_checked(option):
    with pytest.raises(TwigVLMError, match=f"{next(iter(option))}="):
        Stage2Config(**option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": (0.0, 0.0), "teacher_layers": (3,)}, "teacher_layers=3: does not apply where gamma=0 0"),
        ({"budgets": (64.0,), "beta": 4.0}, "beta=4: does not apply with a single budget"),
        ({"budgets": (64.0,), "power": 1.0}, "power=1: does not apply with a single budget"),
        ({"beta": 0.0, "power": 1.0}, "power=1: does not apply where beta=0"),
    ],
)
def test_options_that_do_nothing_are_refused(options, message):
    with pytest.raises(TwigVLMError, match=f"^{message}; leave it out$"):
        Stage2Config(**options)
    Stage2Config(gamma=(0.0, 1.0), teacher_layers=(3,))


def test_tensorboard_has_every_figure(make_policy, dataset, tmp_path):
    run(make_policy(), dataset, tmp_path, max_steps=1, tensorboard=True)
    names = ("loss", "reward", "reward_spread", "advantage_spread", "entropy", "retain", "attention_kl")
    assert logged(tmp_path) >= {f"train/{name}" for name in names}
