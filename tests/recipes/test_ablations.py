"""The recipe that trains and compares twigs, on a tiny model."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.sapling import ablations
from recipes.sapling.ablation_runs import Run
from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from tests.training.runs import make_samples
from twigvlm.checkpoints.twig_files import WEIGHTS
from twigvlm.config import TwigConfig
from twigvlm.model import TwigVLM
from twigvlm.training.options import Stage1Config, Stage2Config

SHAPE = TwigConfig(trunk_layers=1, twig_layers=2, head="shared", draft_vocabulary=40, final_wipe=5, pruning_head=True)
RUNS = {
    "taught": Run(Stage1Config(batch_size=4, learning_rate=1e-3), 8, twig=SHAPE, budgets=(8.0,)),
    "rewarded": Run(
        Stage2Config(batch_size=2, learning_rate=1e-2, group=4, budgets=(8,)), 4, "taught", twig=SHAPE, budgets=(8.0,)
    ),
}


@pytest.fixture
def options(tmp_path, monkeypatch):
    data, asked = tmp_path / "data", tmp_path / "asked"
    samples, rows = make_samples(), []
    for folder in (data, asked):
        folder.mkdir()
    for sample in samples:
        image = f"{sample['id']}.png"
        for folder in (data, asked):
            sample["image"].save(folder / image)
        sample["image"] = image
        rows.append({"id": sample["id"], "image": image, "question": "What?", "answer": "a", "kind": "short"})
    rows[-1]["objects"] = []
    (data / "conversations.json").write_text(json.dumps(samples))
    (asked / "questions.json").write_text(json.dumps({"split": "test", "questions": rows}))
    processor = tiny_processor()
    monkeypatch.setattr(ablations, "load_base", lambda *_: (tiny_llava(), processor))
    monkeypatch.setattr(ablations, "RUNS", RUNS)
    monkeypatch.setattr(ablations, "LONGEST", 8)
    output = tmp_path / "runs"
    return ablations.Options(data, (asked,), output, tuple(RUNS), batch=3, device="cpu", workers=0)


def test_each_run_is_trained_asked_and_reported_once(options, monkeypatch, capsys):
    ablations.main(options)
    table = capsys.readouterr().out
    assert "7 short questions of the test split" in table
    assert [line.split(" | ")[0] for line in table.splitlines()][-3:] == ["| no pruning", "| taught", "| rewarded"]
    asked = json.loads(ablations.asked_file(options.output / "taught", "test").read_text())
    assert len(asked["drafts"]["drafted"]) == len(asked["drafts"]["accepted"]) > 0
    model = TwigVLM.from_pretrained(tiny_llava(), options.output / "taught")
    asker = ablations.Asker(dataclasses.replace(options, batch=1))
    batch = asker.short["test"][0]
    ids = model.generate(**batch.inputs, retain=8, final_wipe=5, max_new_tokens=16)[
        0, batch.inputs["input_ids"].shape[1] :
    ]
    alone = asker.processor.decode(ids, skip_special_tokens=True).strip()
    assert asked["answers"]["twig@8/5"][batch.questions[0].id] == alone

    monkeypatch.setattr(ablations, "train", None)  # nothing is trained again
    ablations.main(options)
    assert capsys.readouterr().out == table


def test_other_questions_are_asked_again(options):
    folder = options.output / ablations.PLAIN
    kept, source = ablations.asked_file(folder, "test"), options.questions[0] / "questions.json"

    def ask():
        ablations.Asker(options).ask(ablations.PLAIN, folder)
        return json.loads(kept.read_text())

    marked = {**ask(), "marked": True}
    kept.write_text(json.dumps(marked))
    assert ask() == marked
    source.write_text(source.read_text().replace("What?", "Where?"))
    assert "marked" not in ask()


def test_stage_2_changes_the_p_head_alone(options):
    ablations.train("taught", options)
    ablations.train("rewarded", options)
    taught, rewarded = (
        TwigVLM.from_pretrained(tiny_llava(), options.output / name).twig.state_dict()
        for name in ("taught", "rewarded")
    )
    changed = {name for name in taught if not torch.equal(taught[name], rewarded[name])}
    assert changed == {name for name in taught if name.startswith("pruning_head.")}


def test_weights_are_the_trained_ones_rounded_once(tmp_path):
    trained = {"twig.a": torch.tensor([1 + 2**-9]), "twig.ids": torch.tensor([70000])}
    save_file(trained, tmp_path / "trained")
    save_file(
        {"a": trained["twig.a"].bfloat16(), "ids": trained["twig.ids"]}, tmp_path / WEIGHTS, metadata={"format": "pt"}
    )
    ablations.round_once(tmp_path / "trained", tmp_path / WEIGHTS)
    state = load_file(tmp_path / WEIGHTS)
    assert state["a"].dtype == torch.float16
    assert torch.equal(state["a"].float(), trained["twig.a"])
    assert torch.equal(state["ids"], trained["twig.ids"])


def test_a_run_alone_is_reported_and_one_without_its_start_is_refused(options, capsys):
    with pytest.raises(SystemExit, match="'rewarded': starts from 'taught'"):
        ablations.main(dataclasses.replace(options, runs=("rewarded",)))
    ablations.main(dataclasses.replace(options, runs=("taught",)))
    assert "| taught | 8/5 |" in capsys.readouterr().out


def test_stage_2_asks_one_short_question_about_each_picture(options):
    def turn(question, answer):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    short, long, later = (
        turn("<image>\nWhat?", "a cat"),
        turn("<image>\nDescribe it.", "a " * 40),
        turn("Where?", "left"),
    )
    samples = [
        {"id": str(place), "image": f"{place}.png", "conversations": turns + later}
        for place, turns in enumerate((short, long, short))
    ]
    (options.data / "conversations.json").write_text(json.dumps(samples))
    chosen = ablations.conversations(options.data, 2, short=True)
    assert [sample["id"] for sample in chosen] == ["0", "2"]
    assert all(sample["conversations"] == short for sample in chosen)
    assert len(ablations.conversations(options.data, 3)[1]["conversations"]) == 4
    with pytest.raises(SystemExit, match="2 conversations, 3 are needed"):
        ablations.conversations(options.data, 3, short=True)


def test_too_few_conversations_are_refused(options):
    with pytest.raises(SystemExit, match="8 conversations, 9 are needed"):
        ablations.conversations(options.data, 9)


def test_an_unknown_run_is_refused(options):
    with pytest.raises(SystemExit, match="run 'other': must be one of"):
        ablations.main(dataclasses.replace(options, runs=("other",)))
