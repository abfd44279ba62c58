"""Stage 2: rewards are the pruned base's own, and seed, step and part decide what is drawn."""

from unittest.mock import Mock

import pytest
import torch

from tests.training.stage2 import settings
from twigvlm.training.data.dataset import Collator
from twigvlm.training.data.turns import answer_length, draw_turns, last_prompt_tokens
from twigvlm.training.reinforce import Policy


def recorded(monkeypatch):
    """What the policy draws, and what it is paid for it."""
    from twigvlm.training import reinforce

    seen = []
    draw, pay = reinforce.plackett_luce.sample, reinforce.answer_likelihoods

    def sample(*arguments):
        actions = draw(*arguments)
        seen.append({"actions": actions})
        return actions

    def rewards(batch, cases, *arguments):
        paid = pay(batch, cases, *arguments)
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

    ranks = torch.arange(len(kept), 0, -1.0)  # drawn first, ranked first
    chosen = torch.zeros(1, query + 1).index_copy(1, kept, ranks[None])
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


@pytest.mark.parametrize(("chunk", "passes", "share", "keep"), [(None, 1, 0.0, 4), (3, 3, 0.0, 4), (None, 1, 0.5, 3)])
def test_rewards_are_the_pruned_bases_own(make_policy, dataset, monkeypatch, chunk, passes, share, keep):
    from twigvlm.training import rewards as rewarding

    model, seen = make_policy(final_share=share), recorded(monkeypatch)
    run_cuts = Mock(wraps=rewarding.run_cuts)
    monkeypatch.setattr(rewarding, "run_cuts", run_cuts)
    items = [dataset[0], dataset[2]]
    policy = Policy(model, settings(budgets=(5.0,), chunk=chunk), 10)
    terms = policy(**Collator(pad_token_id=0)(items), step=3, part=0)
    assert len(seen) == 2
    assert run_cuts.call_count == passes
    for item, group in zip(items, seen, strict=True):
        query = int((item["labels"][0] != -100).nonzero().min()) - 1
        kept, rewards = group["kept"], group["rewards"]
        assert kept.shape == (4, keep)
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


def test_seed_step_and_part_decide_the_draws(make_policy, dataset, monkeypatch):
    model, seen = make_policy(), recorded(monkeypatch)
    for seed, step, part in [(0, 1, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]:
        Policy(model, settings(seed=seed, budgets=(5.0,)), 10)(**dataset[0], step=step, part=part)
    draws = [group["actions"].tolist() for group in seen]
    assert draws[0] == draws[1]
    assert all(draws[0] != other for other in draws[2:])


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
