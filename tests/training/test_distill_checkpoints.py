"""How a run of stage 1 is kept, continued and recorded, and that weights that are not finite end it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.training.stage1 import run
from tests.training.stop import StopAt
from tests.training.weights import copy, same
from twigvlm.errors import TwigVLMError
from twigvlm.training.data.dataset import ConversationDataset
from twigvlm.training.data.load import load_samples


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


def test_a_run_that_had_ended_is_resumed_without_another_step(make_model, dataset, tmp_path):
    options = {"max_steps": 3, "batch_size": 1, "save_steps": 3}  # a part of an epoch
    whole, again = make_model(), make_model()
    run(whole, dataset, tmp_path, **options)
    log = run(again, dataset, tmp_path, resume=True, **options)
    assert max(entry["step"] for entry in log) == 3
    assert again.twig.record == whole.twig.record
    assert same(copy(whole.twig), copy(again.twig))


def test_a_run_goes_on_saving_as_often_as_is_asked_for_now(make_model, dataset, tmp_path):
    options = {"max_steps": 4, "batch_size": 1, "log_steps": 4}
    run(make_model(), dataset, tmp_path, save_steps=2, callbacks=[StopAt(2)], **options)
    log = run(make_model(), dataset, tmp_path, resume=True, save_steps=1, **{**options, "log_steps": 1})
    assert (tmp_path / "checkpoint-3").is_dir()
    assert {entry["step"] for entry in log if "loss" in entry} >= {3, 4}


def test_samples_end_where_the_context_of_the_base_does(make_model, samples, processor, tmp_path):
    model = make_model()
    context = model.base.context
    samples[0]["conversations"][-1]["value"] = "word " * context
    run(model, ConversationDataset(samples, processor), tmp_path / "cut", max_steps=8, batch_size=1)
    longer = ConversationDataset(samples, processor, max_length=context + 1)
    with pytest.raises(TwigVLMError, match=f"max_length={context + 1}: must be at most {context}"):
        run(make_model(), longer, tmp_path / "refused", max_steps=1)


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
    with pytest.raises(TwigVLMError, match=r"dtype=torch.bfloat16: .* with torch.float32"):
        run(make_model(torch.bfloat16), dataset, tmp_path, resume=True, max_steps=2, save_steps=1)
    assert (tmp_path / "settings.json").read_text() == before
    run(make_model(), dataset, tmp_path, resume=True, max_steps=2, save_steps=5, gradient_checkpointing=True)


def test_resuming_on_other_samples_is_refused(make_model, processor, tmp_path):
    def data(answer):
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
        (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * 8))
        return ConversationDataset(load_samples(tmp_path / "data.json"), processor)

    run(make_model(), data("That."), tmp_path / "run", max_steps=1)
    with pytest.raises(TwigVLMError, match=r"data=.*: the checkpoint in .* was trained with"):
        run(make_model(), data("This."), tmp_path / "run", resume=True, max_steps=1)
    run(make_model(), data("That."), tmp_path / "run", resume=True, max_steps=1)


def test_a_broken_picture_is_replaced_while_training_and_when_it_goes_on(make_model, samples, processor, tmp_path):
    samples[5]["image"] = str(tmp_path / "none.png")
    options = {"max_steps": 4, "batch_size": 2, "accumulate": 1, "save_steps": 2}
    whole = make_model()
    run(whole, ConversationDataset(samples, processor), tmp_path / "whole", **options)
    begun, resumed = make_model(), make_model()
    run(begun, ConversationDataset(samples, processor), tmp_path / "parts", callbacks=[StopAt(2)], **options)
    run(resumed, ConversationDataset(samples, processor), tmp_path / "parts", resume=True, **options)
    assert same(copy(whole.twig), copy(resumed.twig))


def test_a_loss_that_is_no_number_ends_the_run(make_model, dataset, tmp_path):
    model = make_model(dtype=torch.bfloat16)
    with pytest.raises(
        TwigVLMError, match=r"loss=.* by step .*: the training diverged; .*lower learning rate than 1e\+30"
    ):
        run(model, dataset, tmp_path, max_steps=8, learning_rate=1e30, warmup=0.0)
    assert not model.training
    assert model.twig.norm.weight.dtype == torch.bfloat16


class Break(TrainerCallback):
    """Makes a weight NaN at one step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.twig.norm.weight[0] = float("nan")


@pytest.mark.parametrize(("steps", "saved"), [(1, []), (2, ["checkpoint-1"])])
def test_weights_that_are_not_finite_never_reach_a_checkpoint(make_model, dataset, tmp_path, steps, saved):
    model = make_model()
    with pytest.raises(
        TwigVLMError, match=f"NaN or infinite weights by step {steps}: the training diverged; .* than 0.001"
    ):
        run(model, dataset, tmp_path, max_steps=steps, save_steps=1, callbacks=[Break(steps)])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == saved
    assert not model.twig.record


def test_a_run_that_is_stopped_with_weights_that_are_not_finite_fails(make_model, dataset, tmp_path):
    with pytest.raises(TwigVLMError, match="NaN or infinite weights by step 2"):
        run(make_model(), dataset, tmp_path, max_steps=5, callbacks=[Break(2), StopAt(2)])


@pytest.mark.parametrize("stop", [[], [StopAt(3)]])
def test_the_last_step_is_logged_and_recorded(make_model, dataset, tmp_path, stop):
    model = make_model()
    log = run(model, dataset, tmp_path, max_steps=5 if stop else 3, log_steps=2, callbacks=stop)
    losses = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 3]
    (stage,) = model.twig.record
    assert stage["steps"] == 3
    assert stage["final"] == {name: losses[-1][name] for name in ("loss", "next_token")}


def test_a_run_that_was_finished_records_its_last_step_when_resumed(make_model, dataset, tmp_path):
    records = []
    for resume in (False, True):
        model = make_model()
        run(model, dataset, tmp_path, resume, max_steps=2, log_steps=50)
        records.append(model.twig.record)
    assert records[0] == records[1]
    assert records[0][0]["final"]["loss"] > 0


def test_a_directory_with_checkpoints_is_not_begun_anew(make_model, dataset, tmp_path):
    run(make_model(), dataset, tmp_path, max_steps=1)
    with pytest.raises(TwigVLMError, match="holds checkpoints; resume, or choose another directory"):
        run(make_model(), dataset, tmp_path, max_steps=1)
