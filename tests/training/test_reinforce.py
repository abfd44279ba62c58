"""Stage 2: rewards, what learns and what does not, and the stream of random draws."""

from unittest.mock import Mock

import pytest
import torch

from tests.training.events import logged
from tests.training.stop import StopAt
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import solve_keep
from twigvlm.training import options
from twigvlm.training.data.dataset import Collator
from twigvlm.training.data.turns import answer_length, draw_turns, last_prompt_tokens
from twigvlm.training.options import Stage2Config
from twigvlm.training.reinforce import Policy, budget_probabilities, train_stage2

# R̄ of the tiny model (16 visual tokens, 6 layers, K = 1, K_f = 5): R = 4 and 10
BUDGETS = (5.0, 9.0)


@pytest.fixture
def make_policy(make_model):
    def make(dtype=None, **options):
        torch.manual_seed(0)
        return make_model(dtype, pruning_head=True, final_wipe=5, **options)

    return make


def settings(**changes):
    return Stage2Config(
        **{
            "batch_size": 4,
            "log_steps": 1,
            "group": 4,
            "budgets": BUDGETS,
            "learning_rate": 1e-2,
            "warmup": 0.0,
            **changes,
        }
    )


def run(model, dataset, directory, resume=False, callbacks=(), **options):
    return train_stage2(model, dataset, settings(**options), directory, resume, callbacks)


def copy(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


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


def recorded(monkeypatch):
    """What the policy draws, and what it is paid for it."""
    from twigvlm.training import reinforce

    seen = []
    draw, pay = reinforce.plackett_luce.sample, reinforce.answer_likelihoods

    def sample(*arguments):
        actions = draw(*arguments)
        seen.append({"actions": actions})
        return actions

    def rewards(base, hidden, visual, rope, masks, cases, *arguments):
        paid = pay(base, hidden, visual, rope, masks, cases, *arguments)
        for group, case, rewards in zip(seen[-len(cases) :], cases, paid, strict=True):
            group |= {"kept": case.kept, "rewards": rewards}
        return paid

    monkeypatch.setattr(reinforce.plackett_luce, "sample", sample)
    monkeypatch.setattr(reinforce, "answer_likelihoods", rewards)
    return seen


def one_by_one(model, item, kept, query):
    """The prompt pruned as at inference, and the answer forced upon it token by token."""
    ids, paid = item["input_ids"], []
    answer = ids[0, query + 1 :]

    def force(tokens, scores):
        token = answer[len(paid)]
        paid.append(float(scores.log_softmax(-1)[0, token]))
        return torch.full_like(scores, -1e9).index_fill(1, token, 0.0)

    chosen = torch.zeros(1, query + 1).index_fill(1, kept, 1.0)
    output = model.generate(
        input_ids=ids[:, : query + 1],
        pixel_values=item["pixel_values"],
        keep=len(kept),
        scorer=lambda trunk: chosen,
        max_new_tokens=len(answer),
        logits_processor=[force],
        return_dict_in_generate=True,
    )
    assert output.kept_indices[0].tolist() == sorted(kept.tolist())
    return sum(paid) / len(answer)


@pytest.mark.parametrize(("chunk", "passes"), [(None, 1), (3, 3)])
def test_rewards_are_the_pruned_bases_own(make_policy, dataset, monkeypatch, chunk, passes):
    from twigvlm.training import reinforce

    model, seen = make_policy(), recorded(monkeypatch)
    run_cuts = Mock(wraps=reinforce.run_cuts)
    monkeypatch.setattr(reinforce, "run_cuts", run_cuts)
    items = [dataset[0], dataset[2]]
    policy = Policy(model, settings(budgets=(5.0,), chunk=chunk), 10)
    terms = policy(**Collator(pad_token_id=0)(items), step=3, part=0)
    assert len(seen) == 2
    assert run_cuts.call_count == passes
    for item, group in zip(items, seen, strict=True):
        query = int((item["labels"][0] != -100).nonzero().min()) - 1
        kept, rewards = group["kept"], group["rewards"]
        assert kept.shape == (4, 4)
        for row, reward in zip(kept, rewards, strict=True):
            assert float(reward) == pytest.approx(one_by_one(model, item, row, query), abs=2e-5)
        assert rewards.std() > 1e-3
    assert float(terms["reward"]) == pytest.approx(float(torch.cat([g["rewards"] for g in seen]).mean()))


def test_earlier_turns_are_context_and_later_ones_unseen(make_policy, dataset, monkeypatch):
    model, item, seen = make_policy(), dataset[1], recorded(monkeypatch)
    policy = Policy(model, settings(budgets=(5.0,)), 10)
    asked = last_prompt_tokens(item["labels"])[0].nonzero()[:, 0].tolist()
    assert len(asked) == 2
    found = set()
    for step in range(8):
        policy(**item, step=step, part=0)
        reward, kept = float(seen[-1]["rewards"][0]), seen[-1]["kept"][0]
        for turn, query in enumerate(asked):
            end = query + 1 + answer_length(item["labels"][0], query)
            cut = {**item, "input_ids": item["input_ids"][:, :end]}
            if reward == pytest.approx(one_by_one(model, cut, kept, query), abs=2e-5):
                found.add(turn)
    assert found == {0, 1}


def test_a_choice_within_an_answer_is_rewarded_by_what_follows(make_policy, dataset, monkeypatch):
    model, item, seen = make_policy(), dataset[1], recorded(monkeypatch)
    policy = Policy(model, settings(budgets=(5.0,), span=2), 10)
    possible = []
    for asked in last_prompt_tokens(item["labels"])[0].nonzero()[:, 0].tolist():
        length = answer_length(item["labels"][0], asked)
        possible += [(asked + start, asked + min(start + 2, length)) for start in range(0, length, 2)]
    assert any(end - start == 2 for start, end in possible)
    found = set()
    for step in range(6 * len(possible)):
        policy(**item, step=step, part=0)
        reward, kept = float(seen[-1]["rewards"][0]), seen[-1]["kept"][0]
        for start, end in set(possible) - found:
            cut = {**item, "input_ids": item["input_ids"][:, : end + 1]}
            if reward == pytest.approx(one_by_one(model, cut, kept, start), abs=2e-5):
                found.add((start, end))
    assert found == set(possible)


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


def test_seed_step_and_part_decide_the_draws(make_policy, dataset, monkeypatch):
    model, seen = make_policy(), recorded(monkeypatch)
    for seed, step, part in [(0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]:
        Policy(model, settings(seed=seed, budgets=(5.0,)), 10)(**dataset[0], step=step, part=part)
    draws = [group["actions"].tolist() for group in seen]
    assert draws[0] == draws[1]
    assert all(draws[0] != other for other in draws[2:])


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


def test_drawn_turns():
    labels = torch.tensor([[-100, -100, 5, 6, -100, -100, 7, -100], [-100, 5, -100, -100, 6, 7, 8, 9]])
    visual = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]]).bool()
    assert last_prompt_tokens(labels).nonzero().tolist() == [[0, 1], [0, 5], [1, 0], [1, 3]]
    drawn = [draw_turns(labels, visual, torch.Generator().manual_seed(seed)).nonzero().tolist() for seed in range(12)]
    # the first turn of the second row stands before its image
    assert all(turns in ([[0, 1], [1, 3]], [[0, 5], [1, 3]]) for turns in drawn)
    assert drawn.count(drawn[0]) < len(drawn)
    assert [answer_length(labels[0], 1), answer_length(labels[0], 5), answer_length(labels[1], 3)] == [2, 1, 4]
    parts = [
        draw_turns(labels, visual, torch.Generator().manual_seed(seed), span=2).nonzero().tolist() for seed in range(30)
    ]
    assert {turns[1][1] for turns in parts} == {3, 5}
    assert {turns[0][1] for turns in parts} == {1, 5}


def test_what_cannot_be_trained_is_refused(make_model, make_policy, dataset, tmp_path):
    with pytest.raises(TwigVLMError, match="no P-Head to train"):
        run(make_model(), dataset, tmp_path / "out")
    with pytest.raises(TwigVLMError, match="budgets=1 2: none is possible for the first sample, of 16 visual tokens"):
        run(make_policy(), dataset, tmp_path / "out", budgets=(1.0, 2.0))
    with pytest.raises(
        TwigVLMError, match=r"keep_budgets=41 .* 227: none is possible for the first sample, of 16 visual tokens"
    ):
        run(make_policy(), dataset, tmp_path / "out", budgets=None)
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


def test_tensorboard_has_every_figure(make_policy, dataset, tmp_path):
    run(make_policy(), dataset, tmp_path, max_steps=1, tensorboard=True)
    names = ("loss", "reward", "reward_spread", "advantage_spread", "entropy", "retain", "attention_kl")
    assert logged(tmp_path) >= {f"train/{name}" for name in names}
