"""Stage 2: samples weigh the same, however an optimiser step deals them out to its passes."""

import pytest
import torch

from tests.families import TRUNK, TWIG, prompt, tiny
from tests.training.stage2 import run, settings
from twigvlm import TwigConfig, TwigVLM
from twigvlm.training import reinforce
from twigvlm.training.data.dataset import IGNORE, Collator
from twigvlm.training.reinforce import Policy


@torch.no_grad()
@pytest.mark.parametrize("gamma", [(0.0, 0.0), (1.0, 1.0)], ids=["rewards", "both"])
def test_a_pass_weighs_by_its_share_of_the_samples_of_its_step(make_policy, dataset, gamma):
    policy = Policy(make_policy(), settings(gamma=gamma), 10)
    for items in ([dataset[0]], [dataset[0], dataset[2]]):
        batch = Collator(pad_token_id=0)(items)
        alone = policy(**batch, step=0, part=0)["loss"]
        shared = policy(**batch, step=0, part=0, samples_in_step=torch.tensor(5))["loss"]
        assert float(shared) == pytest.approx(float(alone) * len(items) / 5, rel=1e-4)


def test_a_step_of_unequal_passes_learns_as_one_of_a_single_pass(make_policy, dataset, tmp_path, monkeypatch):
    """By the attention alone: other passes draw other prunings."""
    monkeypatch.setattr(reinforce, "advantages", torch.zeros_like)
    few, losses = torch.utils.data.Subset(dataset, [0, 2, 4]), []
    for batch_size, accumulate in ((3, 1), (2, 2), (1, 3)):
        options = {"batch_size": batch_size, "accumulate": accumulate, "gamma": (1.0, 1.0), "max_steps": 1}
        losses.append(run(make_policy(), few, tmp_path / str(batch_size), **options)[0]["loss"])
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-4)
    assert losses[0] > 0


def sample(base, seed, text):
    """Inputs of a prompt with a picture, then `text` random tokens, and an answer of two."""
    inputs = prompt(base, "gemma3", "images", seed)
    more = torch.randint(2, 98, (1, text + 2), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat((inputs["input_ids"], more), dim=1)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -2:] = ids[:, -2:]
    types = torch.cat((inputs["token_type_ids"], torch.zeros_like(more)), dim=1)
    return {"input_ids": ids, "labels": labels, "token_type_ids": types, "pixel_values": inputs["pixel_values"]}


@pytest.fixture
def windowed():
    """The L_AttnKL of a step of two samples, by the teacher's layers and the samples of a pass; and two such samples. Layer 5 of
    the base slides over 9 tokens, so that it sees no picture from the end of the long question of the second; layer 6 does."""
    base = tiny("gemma3")
    model = TwigVLM.grow(base, TwigConfig(TRUNK, TWIG, pruning_head=True))
    options = {"budgets": None, "keep_budgets": (4,)}
    without = Policy(model, settings(**options, gamma=(0.0, 0.0)), 10)

    @torch.no_grad()
    def loss(layers, *items):
        policy = Policy(model, settings(**options, gamma=(1.0, 1.0), teacher_layers=layers), 10)
        batch = {**Collator(pad_token_id=0)(items), "step": 0, "part": 0, "samples_in_step": torch.tensor(2)}
        return float(policy(**batch)["loss"] - without(**batch)["loss"])

    return loss, sample(base, 0, text=0), sample(base, 1, text=30)


def test_a_picture_outside_the_window_of_the_teachers_layer_does_not_weigh(windowed):
    attention_loss, near, far = windowed
    assert attention_loss((5,), near) > 0.1
    assert attention_loss((5,), far) == 0
    assert attention_loss((5,), near, far) == pytest.approx(attention_loss((5,), near), rel=1e-3)


def test_a_layer_whose_window_holds_no_picture_does_not_count_in_the_mean(windowed):
    attention_loss, near, far = windowed
    alone = attention_loss((6,), far)
    assert alone > 0.01
    assert attention_loss((5, 6), far) == pytest.approx(alone, rel=1e-4)
    assert attention_loss((5, 6), near) != pytest.approx(attention_loss((6,), near), rel=1e-2)
