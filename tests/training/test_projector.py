"""VisionZip‡: a copy of the projector learns what answers need behind merged tokens, and VisionZip uses it by its directory."""

import pytest
import torch

from tests.families import prompt, tiny
from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from tests.training.runs import make_dataset, make_samples
from tests.training.stop import StopAt
from twigvlm import TwigVLM, TwigVLMError
from twigvlm.base.vlm import BaseVLM
from twigvlm.pruning.methods import make_pruner
from twigvlm.pruning.methods.visionzip import VisionZip
from twigvlm.training.data.dataset import IGNORE, Collator, ConversationDataset
from twigvlm.training.options import ProjectorConfig
from twigvlm.training.projector import Projecting, TunedProjector, train_projector

RETAIN = 6


def tune(tuned, directory, resume=False, callbacks=(), **options):
    common = {"batch_size": 2, "max_steps": 6, "save_steps": 2, "log_steps": 1, "learning_rate": 1e-2, "retain": RETAIN}
    return train_projector(
        tuned, make_dataset(), ProjectorConfig(**{**common, **options}), directory, resume, callbacks
    )


class Dictated:
    """A logits processor that lets one answer be given, and keeps what it was chosen from."""

    def __init__(self, answer):
        self.answer, self.rows = answer, []

    def __call__(self, ids, scores):
        self.rows.append(scores[0].clone())
        return torch.full_like(scores, float("-inf")).index_fill(1, self.answer[len(self.rows) - 1], 0.0)


def test_the_loss_is_that_of_the_answer_behind_the_pruned_picture():
    model, data = tiny_llava(), make_dataset()
    batch = Collator(pad_token_id=0)([data[0]])
    labels = batch.pop("labels")
    batch.pop("attention_mask", None)
    start = int((labels[0] != IGNORE).nonzero()[0])
    answer = batch["input_ids"][0, start:]
    assert (labels[0, start:] == answer).all()  # one turn
    tuned = TunedProjector(BaseVLM(model))
    with torch.no_grad():
        for parameter in tuned.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss = Projecting(tuned, ProjectorConfig(retain=RETAIN))(labels, **batch)["loss"]
    given = {**batch, "input_ids": batch["input_ids"][:, :start]}
    losses = {}
    for name, pruner in (("tuned", VisionZip(projector=tuned.module)), ("own", VisionZip())):
        said = Dictated(answer)
        with torch.no_grad():
            TwigVLM.without_twig(model).generate(
                **given, pruner=pruner, retain=RETAIN, max_new_tokens=len(answer), logits_processor=[said]
            )
        losses[name] = torch.nn.functional.cross_entropy(torch.stack(said.rows), answer)
    torch.testing.assert_close(loss, losses["tuned"], rtol=1e-4, atol=1e-4)
    assert abs(losses["tuned"] - losses["own"]) > 0.01


def test_training_lowers_the_loss_and_changes_the_copy_alone(tmp_path):
    model = tiny_llava()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = TunedProjector(BaseVLM(model))
    log = [entry["loss"] for entry in tune(tuned, tmp_path / "run", max_steps=24) if "loss" in entry]
    assert sum(log[-4:]) < 0.9 * sum(log[:4])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    tuned.save_pretrained(tmp_path / "projector")
    inputs = prompt(model, "llava", "images")
    answers = [
        TwigVLM.without_twig(model).generate(**inputs, pruner=pruner, retain=RETAIN, max_new_tokens=8).tolist()
        for pruner in (f"visionzip:{tmp_path / 'projector'}", VisionZip(projector=tuned.module), "visionzip")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_resumed_training_ends_as_one_that_was_not_stopped(tmp_path):
    whole, first, second = (TunedProjector(BaseVLM(tiny_llava())) for _ in range(3))
    tune(whole, tmp_path / "whole", max_steps=4)
    tune(first, tmp_path / "parts", max_steps=4, callbacks=[StopAt(2)])
    with pytest.raises(TwigVLMError, match="retain=5"):
        tune(second, tmp_path / "parts", resume=True, max_steps=4, retain=5.0)
    tune(second, tmp_path / "parts", resume=True, max_steps=4)
    for name, tensor in whole.module.state_dict().items():
        torch.testing.assert_close(second.module.state_dict()[name], tensor)


def test_other_projectors_are_refused(tmp_path):
    model = TwigVLM.without_twig(tiny_llava())
    inputs = prompt(model.model, "llava", "images")
    with pytest.raises(
        TwigVLMError, match=r"projector\.safetensors is not there; train one with 'twigvlm train visionzip'"
    ):
        model.generate(**inputs, pruner=f"visionzip:{tmp_path}", retain=RETAIN, max_new_tokens=2)
    (tmp_path / "projector.safetensors").write_bytes(b"no weights")
    with pytest.raises(TwigVLMError, match="not a safetensors file"):
        model.generate(**inputs, pruner=f"visionzip:{tmp_path}", retain=RETAIN, max_new_tokens=2)
    tuned = TunedProjector(BaseVLM(tiny_llava()))
    tuned.module.linear_2 = torch.nn.Linear(32, 16)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(TwigVLMError, match="belongs to another base"):
        model.generate(**inputs, pruner=f"visionzip:{tmp_path}", retain=RETAIN, max_new_tokens=2)
    assert make_pruner(f"visionzip:{tmp_path}").projector == str(tmp_path)


class Samples(torch.utils.data.Dataset):
    """One prompt of a family, all of it an answer."""

    def __init__(self, name, kind):
        inputs = dict(prompt(tiny(name), name, kind))
        inputs.pop("attention_mask", None)
        self.sample = {**inputs, "labels": inputs["input_ids"]}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.sample


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_projector_that_merges_patches_is_refused(tmp_path, name):
    tuned = TunedProjector(BaseVLM(tiny(name)))
    with pytest.raises(TwigVLMError, match="projector cannot be tuned for VisionZip"):
        train_projector(tuned, Samples(name, "images"), ProjectorConfig(retain=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_samples_end_where_the_context_of_the_base_does(tmp_path):
    base, samples = BaseVLM(tiny_llava()), make_samples()
    for sample in samples:
        sample["conversations"][-1]["value"] = "word " * base.context
    data, settings = ConversationDataset(samples, tiny_processor()), ProjectorConfig(retain=RETAIN, max_steps=1)
    assert train_projector(TunedProjector(base), data, settings, tmp_path / "run")
    inputs = {"input_ids": prompt(base.model, "llava", "images")["input_ids"].repeat(1, base.context)}
    with pytest.raises(TwigVLMError, match=r"The prompt has .* tokens, the base's context only"):
        train_projector(TunedProjector(base), [{**inputs, "labels": inputs["input_ids"]}], settings, tmp_path / "long")


def test_a_budget_that_no_picture_can_have_is_named(tmp_path):
    with pytest.raises(TwigVLMError, match=r"^retain=0\.3"):
        tune(TunedProjector(BaseVLM(tiny_llava())), tmp_path / "run", retain=0.3)
    assert not (tmp_path / "run").exists()


def test_what_would_teach_nothing_is_refused(tmp_path):
    tuned = TunedProjector(BaseVLM(tiny_llava()))
    with pytest.raises(TwigVLMError, match="retain=16: VisionZip merges nothing among the 16 visual tokens"):
        tune(tuned, tmp_path / "run", retain=16)
    with pytest.raises(TwigVLMError, match="no sample has a picture"):
        train_projector(tuned, Samples("llava", "text"), ProjectorConfig(retain=2), tmp_path / "run")
    with pytest.raises(TwigVLMError, match="retain=inf: must be a number"):
        ProjectorConfig(retain=float("inf"))


def test_a_module_in_float32_serves_a_base_in_half_precision():
    model = tiny_llava().bfloat16()
    inputs = {**prompt(model, "llava", "images")}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    tuned = TunedProjector(BaseVLM(model))
    tuned.module.float()
    how = {"retain": RETAIN, "max_new_tokens": 4}
    given = TwigVLM.without_twig(model).generate(**inputs, pruner=VisionZip(projector=tuned.module), **how)
    assert given.shape[1] == inputs["input_ids"].shape[1] + 4
