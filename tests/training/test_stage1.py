import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.tiny import prompt
from twigvlm.errors import TwigVLMError
from twigvlm.training.data import Collator, frequent_answer_tokens
from twigvlm.training.options import Stage1Config
from twigvlm.training.stage1 import ShallowModel, train_stage1


def copy(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def shallow_logits(model, item):
    """Reference: logits of one unpadded sample at all positions, step by step in plain sight."""
    prompt = model.base.prompt(input_ids=item["input_ids"], pixel_values=item["pixel_values"])
    rope = model.base.rope(prompt)
    masks = model.base.masks(prompt)
    hidden = model.base.run_layers(prompt.hidden, 0, model.config.trunk_layers, rope, masks)
    return model.twig.logits(model.twig(hidden, rope, masks))[0]


def run(model, dataset, directory, resume=False, callbacks=(), **options):
    config = Stage1Config(**{"batch_size": 4, "log_steps": 1, "learning_rate": 1e-3, **options})
    return train_stage1(model, dataset, config, directory, resume, callbacks)


def test_one_step_changes_the_whole_twig_and_nothing_else(make_model, dataset, tmp_path):
    model = make_model()
    base, twig = copy(model.model), copy(model.twig)
    run(model, dataset, tmp_path, max_steps=2, warmup=0.0)
    assert same(base, copy(model.model))
    after = copy(model.twig)
    assert all(not torch.equal(twig[name], after[name]) for name, _ in model.twig.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_loss_is_the_mean_over_answers_whatever_the_padding(make_model, dataset):
    model = make_model()
    items = [dataset[index] for index in range(4)]
    collate = Collator(pad_token_id=0)
    with torch.no_grad():
        together = ShallowModel(model)(**collate(items))["loss"]
        total, count = 0.0, 0
        for item in items:
            logits = shallow_logits(model, item)[:-1]
            targets = item["labels"][0, 1:]
            total += float(F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100))
            count += int((targets != -100).sum())
        split = sum(
            ShallowModel(model)(**collate([item]), num_items_in_batch=torch.tensor(count))["loss"] for item in items
        )
    assert float(together) == pytest.approx(total / count, rel=1e-5)
    assert float(split) == pytest.approx(total / count, rel=1e-5)


def test_a_reduced_vocabulary_ignores_what_it_cannot_draft(make_model, dataset, samples, processor):
    tokens = frequent_answer_tokens(samples, processor, 5)
    model = make_model(head="shared", draft_vocabulary=5, draft_token_ids=tokens)
    item = dataset[0]
    targets = item["labels"][0, 1:]
    inside = torch.isin(targets, tokens)
    assert 0 < inside.sum() < (targets != -100).sum()
    with torch.no_grad():
        logits = shallow_logits(model, item)[:-1][inside]
        rows = torch.tensor([tokens.tolist().index(token) for token in targets[inside].tolist()])
        loss = ShallowModel(model)(**item)["loss"]
    assert logits.shape[-1] == 5
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, rows)), rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_learns(make_model, dataset, tmp_path, attention):
    model = make_model()
    model.model.set_attn_implementation(attention)
    log = run(model, dataset, tmp_path, max_steps=40, batch_size=8, learning_rate=1e-2)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 40
    assert losses[-1] < 0.3 * losses[0]


def test_learning_rate_warms_up_and_follows_a_cosine(make_model, dataset, tmp_path):
    log = run(make_model(), dataset, tmp_path, max_steps=10, warmup=0.2)
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates[0] < rates[2] == max(rates)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1 * rates[2]


def test_optimiser_is_the_published_one(make_model, dataset, tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen.update(optimizer.param_groups[0], kind=type(optimizer.optimizer).__name__)

    run(make_model(), dataset, tmp_path, max_steps=1, callbacks=[Look()])
    assert seen["kind"] == "AdamW"
    assert seen["betas"] == (0.9, 0.98)
    assert seen["weight_decay"] == 0


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def test_resumed_equals_uninterrupted(make_model, dataset, tmp_path):
    whole = make_model()
    run(whole, dataset, tmp_path / "whole", max_steps=5, batch_size=3, accumulate=1, save_steps=2)
    broken = make_model()
    run(broken, dataset, tmp_path / "parts", max_steps=5, batch_size=3, save_steps=2, callbacks=[StopAt(3)])
    assert not same(copy(whole.twig), copy(broken.twig))
    # a checkpoint that was cut off while it was written does not count
    (tmp_path / "parts" / "checkpoint-9").mkdir()
    resumed = make_model()
    log = run(resumed, dataset, tmp_path / "parts", resume=True, max_steps=5, batch_size=3, save_steps=2)
    assert max(entry["step"] for entry in log) == 5
    assert same(copy(whole.twig), copy(resumed.twig))


def test_checkpoints_hold_the_twig_only(make_model, dataset, tmp_path):
    model = make_model(head="shared")
    run(model, dataset, tmp_path, max_steps=1, save_steps=1)
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == {f"twig.{name}" for name in model.twig.state_dict()}


def test_resuming_with_other_settings_is_refused(make_model, dataset, tmp_path):
    run(make_model(), dataset, tmp_path, max_steps=2, save_steps=1)
    before = (tmp_path / "settings.json").read_text()
    assert json.loads(before)["twig_layers"] == 2
    with pytest.raises(TwigVLMError, match=r"twig_layers=1: the checkpoint in .* was trained with 2"):
        run(make_model(twig_layers=1), dataset, tmp_path, resume=True, max_steps=2, save_steps=1)
    with pytest.raises(TwigVLMError, match=r"learning_rate=0\.5"):
        run(make_model(), dataset, tmp_path, resume=True, max_steps=2, save_steps=1, learning_rate=0.5)
    assert (tmp_path / "settings.json").read_text() == before


def test_a_bfloat16_base_trains_a_float32_twig_that_generates_afterwards(make_model, dataset, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    formats = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            formats.append({parameter.dtype for parameter in model.parameters()})

    log = run(model, dataset, tmp_path, max_steps=20, batch_size=8, learning_rate=1e-2, callbacks=[Look()])
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert formats[0] == {torch.float32}
    assert losses[-1] < 0.6 * losses[0]
    assert {parameter.dtype for parameter in model.twig.parameters()} == {torch.bfloat16}
    inputs = {key: value.to(torch.bfloat16) if key == "pixel_values" else value for key, value in prompt().items()}
    model.generate(**inputs, max_new_tokens=4, retain=8.0, speculate="chain")


def test_float16_is_refused(make_model, dataset, tmp_path):
    with pytest.raises(TwigVLMError, match="dtype=float16"):
        run(make_model(dtype=torch.float16), dataset, tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        {"batch_size": 0}, {"accumulate": 0}, {"epochs": 0.0}, {"learning_rate": -1.0}, {"warmup": 1.0},
        {"max_steps": 0}, {"save_steps": 0}, {"workers": -1}, {"learning_rate": float("nan")},
    ],
)  # fmt: skip
def test_settings_are_checked(option):
    ((name, _),) = option.items()
    with pytest.raises(TwigVLMError, match=f"{name}="):
        Stage1Config(**option)


def test_epochs_count_steps(make_model, dataset, tmp_path):
    log = run(make_model(), dataset, tmp_path, epochs=2.0, batch_size=3)
    assert max(entry["step"] for entry in log) == 6  # 8 samples in batches of 3, twice
