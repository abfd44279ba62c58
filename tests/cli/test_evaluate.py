import base64
import json
import shutil

import huggingface_hub
import pytest
from PIL import Image

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.checkpoints.twig_files import CONFIG
from twigvlm.cli.commands import COMMANDS as CLI
from twigvlm.cli.main import main
from twigvlm.cli.parsing import parse
from twigvlm.cli.session import build_inputs
from twigvlm.evaluation import accuracy

COMMANDS = {
    "accuracy": {"budgets": "10", "methods": "fastv"},
    "sweep": {"budgets": "10", "final-wipes": "5"},
    "speed": {"retain": 10, "repeats": 1, "kinds": "place"},
    "drafts": {"retain": 10, "repeats": 1, "kinds": "place", "lengths": 2, "thresholds": 0.3},
    "batches": {"retain": 10, "repeats": 1, "kinds": "place", "sizes": 1},
    "exactness": {"retain": 10},
}
ONE_METHOD = ("drafts", "batches", "exactness")


@pytest.fixture
def arguments(tmp_path, base_directory, twig_directory):
    Image.radial_gradient("L").save(tmp_path / "one.png")
    row = {"image": "one.png", "question": "What?", "answer": "a", "kind": "place"}
    record = {"split": "validation", "questions": [{"id": str(number), **row} for number in range(2)]}
    (tmp_path / "questions.json").write_text(json.dumps(record))

    def build(command, *flags, **changes):
        options = {
            "questions": tmp_path / "questions.json",
            "output": tmp_path / "out",
            "model": base_directory,
            "twig": twig_directory,
            "dtype": "float32",
            "device": "cpu",
            "max-new-tokens": 3,
            "max-description-tokens": 3,
            **COMMANDS[command],
            **changes,
        }
        given = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
        return ["evaluate", command, *(str(w) for name, some in given.items() for w in (f"--{name}", *some)), *flags]

    return build


def test_accuracy_of_published_methods_needs_no_twig(capsys, arguments, tmp_path, refused):
    def without_twig(**changes):
        words = arguments("accuracy", **changes)
        place = words.index("--twig")
        return [*words[:place], *words[place + 2 :]]

    assert main(without_twig(methods="visionzip")) == 0
    assert "| visionzip |  |" in (tmp_path / "out" / "report.md").read_text()
    refused(*without_twig(methods="twig"), words=["needs a twig"])
    refused(*arguments("accuracy", **{"final-wipe": 5}), words=["their own cuts"])


def test_speed_of_drafts_without_a_twig(arguments, base_directory, tmp_path, refused):
    words = [*map(str, arguments("speed", limit=1, baselines="sdpa", assistant=base_directory)), "--systems"]
    place = words.index("--twig")
    words = [*words[:place], *words[place + 2 :]]
    assert main([*words, "lookup", "exit", "HF assistant"]) == 0
    rows = [line.split(" | ") for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "|" in line]
    named = {row[0].removeprefix("| "): row for row in rows}
    for name in ("lookup", "exit", "HF assistant"):
        assert named[name][-1].startswith("0")  # different outputs
    assert float(named["HF assistant"][-3]) == 100.0  # the base drafts for itself
    refused(*words, "chain", "HF assistant", words=("needs a twig",))


@pytest.mark.parametrize("command", ONE_METHOD)
def test_any_method_may_prune(arguments, tmp_path, command):
    assert main(arguments(command, limit=1, method="divprune")) == 0
    record = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1])
    assert "failed" not in json.dumps(record)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "--method divprune" in report
    assert ("| divprune + auto |" in report) == (command == "batches")


@pytest.mark.parametrize("command", COMMANDS)
def test_writes_raw_results_and_a_report(capsys, arguments, tmp_path, command):
    assert main(arguments(command)) == 0
    out, err = capsys.readouterr()
    assert out == f"Raw results: {tmp_path / 'out' / 'results.jsonl'}\nReport: {tmp_path / 'out' / 'report.md'}\n"
    assert err.splitlines()[-1].startswith(("2/2 ", "4/4 "))
    head, *records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert head["settings"]["dtype"] == "float32"
    assert [record["id"].removeprefix("1-") for record in records] == ["0", "1"]
    report = (tmp_path / "out" / "report.md").read_text()
    written = report.split("```")[1].split()
    assert written[:3] == ["twigvlm", "evaluate", command]
    assert main(written[1:]) == 0  # the command in the report asks for the same: nothing is asked again
    assert (tmp_path / "out" / "report.md").read_text() == report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "results.jsonl"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_question_that_fails_is_recorded_and_the_others_go_on(capsys, refused, arguments, tmp_path, command):
    output = tmp_path / "out"
    Image.radial_gradient("L").save(tmp_path / "two.png")
    sound = (tmp_path / "two.png").read_bytes()
    questions = tmp_path / "questions.json"
    record = json.loads(questions.read_text())
    record["questions"][1]["image"] = "two.png"
    questions.write_text(json.dumps(record))
    (tmp_path / "two.png").write_bytes(sound[:500])

    def records():
        return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()[1:]]

    for _ in range(2):  # the same failure is written once
        assert main(arguments(command)) == 0
        err = capsys.readouterr().err
        assert "two.png': corrupt or truncated" in err
        assert "1 failed" in err.splitlines()[-1]
        first, second = records()
        assert "failed" not in first
        assert "two.png': corrupt or truncated" in second["failed"]
        report = (output / "report.md").read_text()
        assert "1 of 2 could not be asked" in report
        assert f"- {second['id']}: image " in report
        assert "nan" not in report
    (tmp_path / "two.png").write_bytes(sound)
    assert main(arguments(command)) == 0  # asked again
    assert "failed" not in capsys.readouterr().err
    assert len(records()) == 3
    assert "could not be asked" not in (output / "report.md").read_text()
    whole = (output / "report.md").read_text()
    assert main(arguments(command)) == 0
    assert (output / "report.md").read_text() == whole
    (tmp_path / "one.png").write_bytes(b"nothing")
    (tmp_path / "two.png").write_bytes(b"nothing")
    refused_line = "every question failed; image "
    capsys.readouterr()
    assert main(arguments(command, output=tmp_path / "new")) == 2
    assert refused_line in capsys.readouterr().err.splitlines()[-1]


def test_questions_that_the_template_or_the_context_refuses_fail(capsys, arguments, base_directory, tmp_path):
    questions = tmp_path / "questions.json"
    record = json.loads(questions.read_text())
    record["questions"] += [
        {**record["questions"][0], "id": "long", "question": "why " * 50},
        {**record["questions"][0], "id": "tag", "question": "An <image> tag?"},
    ]
    questions.write_text(json.dumps(record))
    assert main(arguments("accuracy")) == 0
    err = capsys.readouterr().err
    assert "long: failed, The prompt has " in err
    assert "tag: failed, prompt: contains the image placeholder '<image>'" in err
    assert "| setting | value |" in (tmp_path / "out" / "report.md").read_text()


def test_a_questions_image_may_be_a_data_uri_and_no_address(refused, arguments, tmp_path):
    questions = tmp_path / "questions.json"
    record = json.loads(questions.read_text())
    given = base64.b64encode((tmp_path / "one.png").read_bytes()).decode()
    record["questions"][1]["image"] = f"data:image/png;base64,{given}"
    questions.write_text(json.dumps(record))
    assert main(arguments("accuracy")) == 0
    _, one, two = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert one["given"] == two["given"]
    record["questions"][1]["image"] = "https://example.org/cat.jpg"
    questions.write_text(json.dumps(record))
    refused(*arguments("accuracy", output=tmp_path / "new"), words=("'https://example.org/cat.jpg'", "download"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_budget_has_two_names_in_every_evaluation(command, arguments):
    words = [word for word in arguments(command) if word not in ("--budgets", "--retain", "10")]
    named = [parse(CLI, "", [*words, option, "10"]) for option in ("--budgets", "--retain")]
    assert named[0] == named[1]
    assert named[0] != parse(CLI, "", words)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_continues(capsys, arguments, tmp_path, monkeypatch):
    real, asked = accuracy.answer_all, []

    def answer_all(*given):
        asked.append(given)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(accuracy, "answer_all", answer_all)
    assert main(arguments("accuracy")) == 130
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("twigvlm: interrupted; run the same command again to continue")
    assert str(tmp_path / "out" / "results.jsonl") in line
    assert main(arguments("accuracy")) == 0
    assert len(asked) == 3
    assert (tmp_path / "out" / "report.md").exists()


def test_bad_options_are_refused(refused, arguments, tmp_path):
    assert main(arguments("accuracy")) == 0
    refused(*arguments("accuracy", budgets=9), words=("other settings", "variants"))
    refused(*arguments("accuracy", methods="best"), words=("'best'", "deep:N-M"))
    refused(*arguments("accuracy", budgets=1, output=tmp_path / "new"), words=("retain=1",))
    refused(*arguments("accuracy", kinds="colour"), words=("'colour'", "place"))
    refused(*arguments("accuracy", twig=tmp_path), words=("no twig here",))
    refused(*arguments("accuracy", output=tmp_path / "one.png"), words=("is a file",))
    refused(*arguments("accuracy", questions=tmp_path / "no.json"), words=("no such file",))
    refused(*arguments("speed", repeats=0), words=("repeats=0",))
    refused(*arguments("batches", sizes=3), words=("sizes: 3", "2, the number of prompts"))
    refused(*arguments("speed", baselines="flash", output=tmp_path / "new"), words=("attention 'flash'",))
    for command, option in (
        ("batches", "sizes"),
        ("drafts", "thresholds"),
        ("drafts", "lengths"),
        ("speed", "baselines"),
    ):
        words = arguments(command, **{option: 0})
        words.remove("0")
        refused(*words, words=(f"{option}: none given",))
    refused(*arguments("drafts", lengths=0), words=("draft_length=0",))
    for command in ("drafts", "batches", "exactness", "sweep"):
        refused(*arguments(command, method="none", output=tmp_path / "never"), words=("method=none", "such as twig"))
        refused(*arguments(command, method="fastvv", output=tmp_path / "never"), words=("'fastvv'", "twigvlm methods"))
        assert not (tmp_path / "never").exists()
    questions = tmp_path / "questions.json"
    questions.write_text(questions.read_text().replace("validation", "test"))
    refused(*arguments("sweep"), words=("validation split",))
    refused(*arguments("drafts"), words=("validation split",))


def test_a_twig_may_come_from_the_hub(arguments, twig_directory, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(twig_directory))
    assert main(arguments("exactness", twig="user/twig", checks="chain")) == 0


def test_batches_of_other_kinds_are_other_results(refused, arguments, tmp_path):
    assert main(arguments("batches")) == 0
    questions = tmp_path / "questions.json"
    questions.write_text(questions.read_text().replace('"kind": "place"', '"kind": "count"', 1))
    refused(*arguments("batches", kinds="count", limit=1), words=("other settings", "kinds"))


@pytest.mark.parametrize(
    ("command", "what", "setting"),
    [*((command, "version", "twigvlm") for command in ("accuracy", "exactness")), ("speed", "processor_name", "CPU")],
)
def test_results_of_another_version_or_times_of_another_machine_are_not_reported_as_this_one_s(
    refused, arguments, monkeypatch, command, what, setting
):
    with monkeypatch.context() as before:
        before.setattr(f"twigvlm.cli.evaluate.bench.{what}", lambda *given: "older")
        assert main(arguments(command, limit=1)) == 0
    refused(*arguments(command, limit=1), words=(f"other settings ({setting})",))


def test_a_batch_size_that_is_named_twice_is_measured_once(arguments, tmp_path):
    assert main(arguments("batches", sizes=[1, 1], limit=1, baselines="sdpa")) == 0
    assert "\n1 prompts, the same at every size" in (tmp_path / "out" / "report.md").read_text()


def test_without_a_right_answer_of_the_base_there_is_no_figure(capsys, arguments, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(arguments("accuracy", "--figure", limit=1)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Figure: none, because no answer of the base is right"
    assert not (tmp_path / "out" / "figure.png").exists()


def test_records_of_another_version_are_not_continued(refused, arguments, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("twigvlm.cli.evaluate.bench.RECORDS", 1)
        assert main(arguments("accuracy")) == 0
    refused(*arguments("accuracy"), words=("other settings", "records"))


def test_results_of_a_twig_that_was_tuned_are_not_continued(refused, arguments, twig_directory, tmp_path):
    twig = shutil.copytree(twig_directory, tmp_path / "twig")
    assert main(arguments("exactness", twig=twig, checks="chain")) == 0
    config = json.loads((twig / CONFIG).read_text())
    (twig / CONFIG).write_text(json.dumps(config))  # the same in other words
    assert main(arguments("exactness", twig=twig, checks="chain")) == 0
    config["twig"]["final_wipe"] = 4
    (twig / CONFIG).write_text(json.dumps(config))
    refused(*arguments("exactness", twig=twig, checks="chain"), words=("other settings (twig)",))


def test_a_batch_needs_no_padding_token(picture):
    processor = tiny_processor()
    processor.tokenizer.pad_token = None
    image = Image.open(picture)
    inputs = build_inputs(tiny_llava(), processor, [image, image], ["What?", "What is it?"])
    assert inputs["attention_mask"].sum(dim=1).diff().item() == len(" is it")
    assert inputs["attention_mask"][:, -1].all()
