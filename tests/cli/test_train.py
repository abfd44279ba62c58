import itertools
import json

import pytest
import torch
from PIL import Image

from tests.tiny import prompt, tiny_llava
from twigvlm.cli.main import main
from twigvlm.config import TwigConfig
from twigvlm.files import reserved
from twigvlm.model import TwigVLM
from twigvlm.training.data.dataset import ConversationDataset


@pytest.fixture
def arguments(tmp_path, base_directory):
    samples = []
    for number, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"A {colour} one."}]
        samples.append({"id": number, "image": f"{colour}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(samples))
    basic = {"data": tmp_path / "data.json", "out": tmp_path / "twig", "model": base_directory, "device": "cpu"}

    def build(*flags, **changes):
        options = {
            **basic,
            "twig-layers": 2,
            "batch-size": 2,
            "max-steps": 2,
            "save-steps": 1,
            "log-steps": 1,
            **changes,
        }
        return [
            "train",
            "stage1",
            *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
            *flags,
        ]

    return build


@pytest.fixture
def second(arguments, tmp_path):
    """Arguments of stage 2."""

    def build(**changes):
        words = arguments(**{"out": tmp_path / "tuned", "start": tmp_path / "twig", "group": 2, **changes})
        place = words.index("--twig-layers")
        return ["train", "stage2", *words[2:place], *words[place + 2 :]]

    return build


def test_trains_a_twig_that_loads(capsys, arguments, tmp_path):
    assert main(arguments(**{"head": "shared", "draft-vocabulary": 20, "final-wipe": 5})) == 0
    out, err = capsys.readouterr()
    assert out == f"Twig: {tmp_path / 'twig'}\n"
    assert [line.split(" loss")[0] for line in err.splitlines()] == ["step 1/2", "step 2/2"]
    model = TwigVLM.from_pretrained(tiny_llava(), tmp_path / "twig")
    assert model.twig.config.draft_vocabulary == 20
    assert model.twig.config.final_wipe == 5
    assert model.twig.config.pruning_head
    (stage,) = model.twig.record
    assert (stage["stage"], stage["samples"], stage["steps"]) == ("stage1", 3, 2)
    assert stage["final"].keys() == {"loss", "next_token", "prediction_kl", "attention_kl"}
    assert stage["settings"]["batch_size"] == 2
    assert "### stage1" in (tmp_path / "twig" / "README.md").read_text()


def test_stage_2_goes_on_from_a_twig_of_stage_1(capsys, arguments, second, tmp_path):
    assert main(arguments(**{"final-wipe": 5})) == 0
    first = TwigVLM.from_pretrained(tiny_llava(), tmp_path / "twig").twig.state_dict()
    capsys.readouterr()
    assert main(second(budgets=8)) == 0
    out, err = capsys.readouterr()
    assert out == f"Twig: {tmp_path / 'tuned'}\n"
    assert "reward " in err.splitlines()[1]
    tuned = TwigVLM.from_pretrained(tiny_llava(), tmp_path / "tuned").twig
    assert [entry["stage"] for entry in tuned.record] == ["stage1", "stage2"]
    second = tuned.state_dict()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"pruning_head.query_gate.weight", "pruning_head.key_gate.weight"}


def test_stage_2_takes_budgets_as_kept_tokens_or_as_averages(refused, arguments, second, tmp_path):
    assert main(arguments(**{"final-wipe": 5})) == 0
    assert main([*second(**{"keep-budgets": 3}), "12"]) == 0
    settings = TwigVLM.from_pretrained(tiny_llava(), tmp_path / "tuned").twig.record[1]["settings"]
    assert (settings["keep_budgets"], settings["budgets"]) == ([3, 12], None)
    both = second(out=tmp_path / "both", **{"keep-budgets": 3, "budgets": 8})
    refused(*both, words=["budgets=8 and keep_budgets=3: give only one of them"])
    refused(
        *second(out=tmp_path / "none"),
        words=["keep_budgets=41 72 103 134 165 196 227: none is possible for the first sample with a picture, of 16"],
    )


def test_a_diverged_twig_is_not_written(refused, capsys, arguments, tmp_path):
    assert main(arguments(**{"learning-rate": 1e30, "warmup": 0, "max-steps": 3})) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("twigvlm: error: ")
    assert "the training diverged; start over in another directory with a lower learning rate than 1e+30" in last
    assert [path.name for path in (tmp_path / "twig").iterdir()] == ["checkpoints"]


def test_input_is_checked_before_the_base_is_loaded(refused, monkeypatch, arguments, second, tmp_path):
    assert main(arguments(**{"max-steps": 1})) == 0

    def loaded(*_):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("twigvlm.loading.load_base", loaded)
    new = {"out": tmp_path / "new"}
    (tmp_path / "taken").write_text("x")
    refused(*arguments(data=tmp_path / "none.json", **new), words=["none.json"])
    refused(*arguments(out=tmp_path / "taken" / "twig"), words=["out ", "cannot be written"])
    refused(*arguments(), words=["is not empty"])
    with reserved(tmp_path / "twig", "out"):
        refused(*arguments("--resume"), words=["out ", "another run is writing there"])
    refused(*second(start=tmp_path / "none", **new), words=["none: no twig here"])
    weights = tmp_path / "twig" / "twig_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(*second(**new), words=["truncated"])
    TwigVLM.grow(tiny_llava(), TwigConfig(2, 2)).save_pretrained(tmp_path / "plain")
    refused(*second(start=tmp_path / "plain", **new), words=["start ", "has no P-Head"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("reads", [0, 1, 5, 6])
def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch, arguments, tmp_path, reads):
    """The first sample is read once more, before the training."""
    encode, count = ConversationDataset.__getitem__, itertools.count()

    def interrupted(self, index):
        if next(count) == reads:
            raise KeyboardInterrupt
        return encode(self, index)

    options = {"max-steps": 3}
    assert main(arguments(out=tmp_path / "whole", **options)) == 0
    monkeypatch.setattr(ConversationDataset, "__getitem__", interrupted)
    capsys.readouterr()
    assert main(arguments(**options)) == 130
    out, err = capsys.readouterr()
    assert out == ""
    line = "twigvlm: interrupted; run the same command with --resume to continue from the latest checkpoint"
    assert err.splitlines()[-1] == line
    assert main(arguments("--resume", **options)) == 0
    whole, resumed = (
        TwigVLM.from_pretrained(tiny_llava(), tmp_path / name).twig.state_dict() for name in ("whole", "twig")
    )
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not list((tmp_path / "twig").glob("**/.lock"))


def test_stage_1_goes_on_from_a_twig(refused, arguments, tmp_path):
    assert main(arguments(**{"head": "shared", "draft-vocabulary": 20})) == 0
    refused(*arguments(out=tmp_path / "more", start=tmp_path / "twig"), words=["start", "keeps its shape"])
    words = arguments(out=tmp_path / "more", start=tmp_path / "twig")
    place = words.index("--twig-layers")
    del words[place : place + 2]
    assert main(words) == 0
    first, second = (TwigVLM.from_pretrained(tiny_llava(), tmp_path / name).twig for name in ("twig", "more"))
    assert second.config == first.config
    assert second.config.draft_vocabulary == 20
    assert [entry["stage"] for entry in second.record] == ["stage1", "stage1"]
    assert second.record[0] == first.record[0]
    torch.testing.assert_close(second.norm.weight, first.norm.weight, rtol=0.02, atol=0.001)
    assert not torch.equal(second.norm.weight, first.norm.weight)


def test_tunes_a_projector_and_calibrates_a_schedule(refused, capsys, arguments, tmp_path):
    """What these commands write, VisionZip and FitPrune use."""
    common = arguments()[2 : arguments().index("--twig-layers")]
    place = common.index("--out")
    del common[place : place + 2]
    inputs = {**prompt(), "max_new_tokens": 2, "retain": 8}
    model = TwigVLM.without_twig(tiny_llava())
    for words, makes, method in (
        (["visionzip", "--batch-size", "2", "--max-steps", "1", "--retain", "8"], "Projector", "visionzip"),
        (["fitprune", "--retain", "8", "--count", "2"], "Schedule", "fitprune"),
    ):
        command = ["train", *words, *common, "--out", str(tmp_path / method)]
        assert main(command) == 0
        assert capsys.readouterr().out == f"{makes}: {tmp_path / method}\n"
        model.generate(**inputs, pruner=f"{method}:{tmp_path / method}")
    refused(*command, words=["is not empty; choose another directory"])
    refused(*command, "--resume", words=["resume: does not apply to a schedule"])


def test_never_writes_over_what_is_there(refused, capsys, arguments, tmp_path):
    assert main(arguments()) == 0
    refused(*arguments(), words=["is not empty", "--resume"])
    capsys.readouterr()
    assert main(arguments("--resume")) == 0
    refused(*arguments("--resume", **{"learning-rate": 0.5}), words=["learning_rate=0.5"])


def test_bad_input_writes_nothing(refused, arguments, tmp_path):
    refused(*arguments(data=tmp_path / "none.json"), words=["none.json"])
    refused(*arguments(images=tmp_path / "none"), words=["no such directory"])
    refused(*arguments(out=tmp_path / "data.json"), words=["is a file"])
    refused(*arguments(**{"max-length": 1}), words=["max_length=1"])
    refused(*arguments("--strict", **{"max-length": 10}), words=["sample 0", "no answer within the first 10 tokens"])
    refused(*arguments(**{"twig-layers": 0}), words=["twig_layers=0"])
    refused(*arguments(**{"twig-layers": 9}), words=["twig_layers=9"])
    refused(*arguments(**{"batch-size": 0}), words=["batch_size=0"])
    refused(*arguments(**{"draft-vocabulary": 1000}), words=["draft_vocabulary=1000"])
    (tmp_path / "red.png").unlink()
    refused(*arguments("--strict"), words=["sample 0", "red.png"])
    assert not (tmp_path / "twig").exists()


def test_broken_samples_are_reported_and_skipped(caplog, arguments, tmp_path):
    samples = json.loads((tmp_path / "data.json").read_text())
    answer = {"from": "gpt", "value": "One."}
    samples += [{"id": "text", "conversations": [{"from": "human", "value": "How many?"}, answer]}]
    turns = [{"from": "human", "value": "<image><image>Same?"}, answer]
    samples += [{"id": "pair", "image": ["red.png", "blue.png"], "conversations": turns}, {"id": "empty"}]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    (tmp_path / "green.png").write_bytes(b"nothing")
    assert main(arguments(**{"batch-size": 4})) == 0
    assert [line.split(":")[0] for line in caplog.messages] == [
        "skipped sample 'empty'",
        "skipped 1 of 6 samples",
        "skipped sample 1",
        "skipped 1 of 5 samples",
    ]


def test_no_good_sample_at_all_is_an_error(capsys, arguments):
    assert main(arguments(**{"max-length": 10})) == 2
    assert "all 3 samples are broken; sample 2: no answer within the first 10 tokens" in capsys.readouterr().err
