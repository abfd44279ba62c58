"""The recipe of the shipped twig, on a tiny model."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.sapling import ablations, twig
from tests.recipes.test_ablations import SHAPE
from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from tests.training.runs import make_samples
from twigvlm.checkpoints.twig_files import WEIGHTS
from twigvlm.model import TwigVLM
from twigvlm.training.options import Stage1Config, Stage2Config


def test_a_twig_begins_from_another_bases_twig_but_for_the_tokens_that_it_drafts(tmp_path):
    torch.manual_seed(0)
    TwigVLM.grow(tiny_llava(), SHAPE, torch.arange(40)).save_pretrained(tmp_path)
    old = load_file(tmp_path / WEIGHTS)
    torch.manual_seed(1)
    model = TwigVLM.grow(tiny_llava(), SHAPE, torch.arange(20, 60))
    twig.begin_from(model, tmp_path / WEIGHTS)
    state = model.twig.state_dict()
    assert all(torch.equal(state[name].float(), old[name].float()) for name in old if name != "draft_token_ids")
    assert state["draft_token_ids"].tolist() == list(range(20, 60))


def test_a_twig_of_another_shape_is_refused(tmp_path):
    model = TwigVLM.grow(tiny_llava(), dataclasses.replace(SHAPE, twig_layers=1), torch.arange(40))
    save_file({"layers.7.weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(SystemExit, match="does not fit a twig of this shape"):
        twig.begin_from(model, tmp_path / WEIGHTS)


def test_stage_2_follows_stage_1_and_moves_the_p_head_alone(tmp_path, monkeypatch):
    samples = make_samples()
    for sample in samples:
        sample.pop("image").save(tmp_path / f"{sample['id']}.png")
        sample["image"] = f"{sample['id']}.png"
    (tmp_path / "conversations.json").write_text(json.dumps(samples))
    loaded = (tiny_llava(), tiny_processor())
    monkeypatch.setattr(twig.sapling, "load", lambda *_: loaded)
    monkeypatch.setattr(ablations, "load_base", lambda *_: loaded)
    monkeypatch.setattr(twig, "SHAPE", SHAPE)
    monkeypatch.setattr(twig, "DISTILLING", Stage1Config(batch_size=2, learning_rate=1e-3))
    monkeypatch.setattr(twig, "REWARDING", Stage2Config(batch_size=2, learning_rate=1e-2, group=4, budgets=(8,)))
    twig.main(twig.Options(tmp_path, tmp_path / "out", samples=8, rewarded=4, threads=torch.get_num_threads()))
    before, after = (load_file(tmp_path / "out" / folder / WEIGHTS) for folder in ("distilled", "."))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"pruning_head.query_gate.weight", "pruning_head.key_gate.weight"}
    assert len(TwigVLM.from_pretrained(tiny_llava(), tmp_path / "out").twig.record) == 2


def test_one_question_of_each_picture_every_third_with_the_longest_answer():
    answers = ["yes", "a long description of it all", "two", "left", "red"]
    messages = []
    for number, answer in enumerate(answers):
        start = "" if messages else "<image>\n"
        messages += [{"from": "human", "value": f"{start}{number}?"}, {"from": "gpt", "value": answer}]
    chosen = twig.one_question_each([{"image": f"{n}.png", "conversations": messages} for n in range(9)])
    assert [sample["image"] for sample in chosen] == [f"{n}.png" for n in range(9)]
    for number, sample in enumerate(chosen):
        question, answer = (message["value"] for message in sample["conversations"])
        assert question == f"<image>\n{answers.index(answer)}?"
        assert (answer == answers[1]) == (number % 3 == 0)
    assert len({sample["conversations"][1]["value"] for sample in chosen}) > 2
