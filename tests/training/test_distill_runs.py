"""A run of stage 1: what it changes, how it learns, in which number formats, and what it refuses."""

import sys

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny import prompt, tiny_llava
from tests.training.events import logged
from tests.training.stage1 import run
from tests.training.weights import copy, same
from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigVLM
from twigvlm.training.data.dataset import ConversationDataset
from twigvlm.training.options import Stage1Config


def test_one_step_changes_the_whole_twig_and_nothing_else(make_model, dataset, tmp_path):
    model = make_model()
    base, twig = copy(model.model), copy(model.twig)
    run(model, dataset, tmp_path, max_steps=2, warmup=0.0)
    assert same(base, copy(model.model))
    after = copy(model.twig)
    assert all(not torch.equal(twig[name], after[name]) for name, _ in model.twig.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


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
        {"max_steps": 0}, {"save_steps": 0}, {"workers": -1}, {"learning_rate": float("nan")}, {"alpha": -0.1},
        {"gamma": float("inf")}, {"seed": -1}, {"seed": 2**32}, {"temperature": 0.0}, {"clip": -1.0}, {"teacher_layers": (0,)},
        {"epochs": float("inf")}, {"temperature": float("inf")}, {"clip": float("inf")}, {"learning_rate": float("inf")},
        {"epochs": True},
    ],
)  # fmt: skip
def test_settings_are_checked(option):
    ((name, _),) = option.items()
    with pytest.raises(TwigVLMError, match=f"{name}="):
        Stage1Config(**option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 9, "epochs": 2.0}, "epochs=2: does not apply with max_steps=9"),
        ({"alpha": 0.0, "temperature": 1.0}, "temperature=1: does not apply where alpha=0"),
        ({"alpha": 0.0, "clip": 1.0}, "clip=1: does not apply where alpha=0"),
        ({"gamma": 0.0, "teacher_layers": (3, 4)}, "teacher_layers=3 4: does not apply where gamma=0 and gamma_answers=0"),
    ],
)  # fmt: skip
def test_options_that_do_nothing_are_refused(options, message):
    with pytest.raises(TwigVLMError, match=f"^{message}; leave it out$"):
        Stage1Config(**options)
    Stage1Config(gamma=0.0, gamma_answers=1.0, teacher_layers=(3, 4))


@pytest.mark.parametrize("gammas", [(1.0, 0.0), (0.0, 1.0)], ids=["prompts", "answers"])
def test_a_step_of_fewer_samples_than_a_batch_learns_attention_by_those_it_has(make_model, dataset, tmp_path, gammas):
    """The last step of an epoch, or one of data that do not fill a batch, does not learn less than others."""
    gamma, gamma_answers = gammas
    few = torch.utils.data.Subset(dataset, [0, 4])
    name = "attention_kl" if gamma else "answer_attention_kl"
    for batch_size, accumulate in ((2, 1), (8, 1), (1, 8), (2, 4)):
        options = {"batch_size": batch_size, "accumulate": accumulate, "gamma": gamma, "gamma_answers": gamma_answers}
        folder = tmp_path / f"{batch_size}-{accumulate}"
        first = run(make_model(pruning_head=True), few, folder, max_steps=1, **options)[0]
        assert first["loss"] == pytest.approx(first["next_token"] + first[name], rel=1e-3)


def test_epochs_count_steps(make_model, dataset, tmp_path):
    log = run(make_model(), dataset, tmp_path, epochs=2.0, batch_size=3)
    assert max(entry["step"] for entry in log) == 6  # 8 samples in batches of 3, twice


def test_distillation_changes_the_p_head_too(make_model, dataset, tmp_path):
    model = make_model(pruning_head=True)
    base, twig = copy(model.model), copy(model.twig)
    log = run(model, dataset, tmp_path, max_steps=2, warmup=0.0, alpha=0.1, gamma=1.0)
    assert same(base, copy(model.model))
    after = copy(model.twig)
    assert all(not torch.equal(twig[name], after[name]) for name, _ in model.twig.named_parameters())
    first = log[0]
    expected = first["next_token"] + 0.1 * first["prediction_kl"] + first["attention_kl"]
    assert first["loss"] == pytest.approx(expected, rel=1e-3)


def test_growing_and_loading_under_inference_mode_makes_a_twig_that_trains(make_model, dataset, tmp_path):
    with torch.inference_mode():
        model = make_model(pruning_head=True)
        model.save_pretrained(tmp_path / "twig")
        loaded = TwigVLM.from_pretrained(tiny_llava(), tmp_path / "twig")
    for number, grown in enumerate((model, loaded)):
        before = copy(grown.twig)
        run(grown, dataset, tmp_path / str(number), max_steps=1, warmup=0.0, gamma=1.0)
        assert not any(torch.equal(before[name], tensor) for name, tensor in grown.twig.named_parameters())


def test_what_cannot_be_trained_under_inference_mode_is_refused(make_model, dataset, tmp_path):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(TwigVLMError, match=r"torch.inference_mode: nothing can be trained inside it"):
            run(make_model(), dataset, tmp_path / "out", max_steps=1)
    with torch.inference_mode():
        model = make_model(head="shared")
    with pytest.raises(TwigVLMError, match=r"base: was loaded inside torch.inference_mode"):
        run(model, dataset, tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_twig_is_refused(dataset, tmp_path):
    with pytest.raises(TwigVLMError, match=r"this model has no twig to train; grow one with TwigVLM\.grow"):
        run(TwigVLM.without_twig(tiny_llava()), dataset, tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out").exists()


def test_data_without_samples_are_refused(make_model, processor, tmp_path):
    with pytest.raises(TwigVLMError, match="data: holds no samples; give at least one conversation"):
        run(make_model(), ConversationDataset([], processor), tmp_path / "out", max_steps=1)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_taught_is_refused(make_model, dataset, tmp_path):
    with pytest.raises(TwigVLMError, match=r"gamma=1: .* has none.*pruning_head=True or set gamma=0"):
        run(make_model(), dataset, tmp_path / "out", gamma=1.0)
    with pytest.raises(TwigVLMError, match=r"gamma_answers=1: .* has none.*or set gamma_answers=0"):
        run(make_model(), dataset, tmp_path / "out", gamma_answers=1.0)
    for layer in (1, 7):
        with pytest.raises(TwigVLMError, match=f"teacher_layers={layer}: must be 2 to 6"):
            run(make_model(pruning_head=True), dataset, tmp_path / "out", gamma=1.0, teacher_layers=(layer,))
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_base_distils_into_a_float32_twig(make_model, dataset, tmp_path):
    model = make_model(dtype=torch.bfloat16, pruning_head=True)
    log = run(model, dataset, tmp_path, max_steps=8, batch_size=4, learning_rate=1e-2, alpha=0.1, gamma=1.0)
    assert log[-2]["attention_kl"] < 0.7 * log[0]["attention_kl"]
    assert model.twig.pruning_head.key_gate.weight.dtype == torch.bfloat16


def test_tensorboard_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TwigVLMError, match=r"tensorboard: is not installed; run: pip install 'twigvlm\[train\]'"):
        Stage1Config(tensorboard=True)


def test_tensorboard_has_every_term(make_model, dataset, tmp_path):
    run(make_model(pruning_head=True), dataset, tmp_path, max_steps=1, alpha=0.1, gamma=1.0, tensorboard=True)
    assert logged(tmp_path) >= {f"train/{name}" for name in ("loss", "next_token", "prediction_kl", "attention_kl")}
