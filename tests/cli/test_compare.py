import dataclasses
import json

import pytest
from PIL import Image

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.base.families import Tower, family_of
from twigvlm.cli.main import main
from twigvlm.cli.session import build_inputs
from twigvlm.evaluation import accuracy, speed

METHODS = ["base", "twig", "refocus:0.9", "visionzip"]


@pytest.fixture(autouse=True)
def _no_cleaning_up_before_memory_is_watched(monkeypatch):
    """It takes most of the time of such small models."""
    monkeypatch.setattr("twigvlm.evaluation.peak_memory.reset_peak", lambda device: None)


@pytest.fixture(scope="module")
def right():
    """What the base answers, in up to four tokens."""
    processor, base = tiny_processor(), tiny_llava()
    inputs = build_inputs(base, processor, [Image.radial_gradient("L")], ["What?"])
    ids = base.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    return [processor.tokenizer.decode([token]) for token in ids.tolist()]


@pytest.fixture
def arguments(tmp_path, base_directory, twig_directory, right):
    Image.radial_gradient("L").save(tmp_path / "one.png")
    row = {"image": "one.png", "question": "What?"}
    rows = [
        {**row, "id": "0", "kind": "place", "answer": "".join(right[:2])},
        {**row, "id": "1", "kind": "rows", "answer": "".join(right), "long": True},
    ]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": rows}))

    def build(*flags, **changes):
        options = {
            "questions": tmp_path / "questions.json",
            "output": tmp_path / "out",
            "model": base_directory,
            "twig": twig_directory,
            "dtype": "float32",
            "device": "cpu",
            "max-new-tokens": 2,
            "max-description-tokens": 4,
            "budgets": 10,
            "methods": "fastv",
            **changes,
        }
        words = []
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return ["compare", *words, *flags]

    return build


def rows_of(report, heading):
    """Cells of the first table under a heading, less its first two lines."""
    table = report.split(f"## {heading}\n")[1].split("| --- |")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_every_method_and_budget_is_answered_and_timed(capsys, arguments, tmp_path):
    asked = arguments(methods=METHODS, budgets=[10, 12], speculate=["none", "chain"], baselines="sdpa")
    assert main(asked) == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.splitlines() == [
        f"Raw results: {out / 'results.jsonl'}",
        f"Report: {out / 'report.md'}",
        f"Times: {out / 'times.jsonl'}",
        f"Figure: {out / 'figure.png'}",
    ]
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    expected = [("**base**", "–"), ("own loop", "–"), ("base + chain", "–")]
    for method in METHODS[1:]:
        expected += [(method + drafts, budget) for budget in ("10", "12") for drafts in ("", " + chain")]
    rows = rows_of(report, "Comparison")
    assert [tuple(row[:2]) for row in rows] == expected
    assert rows[0][3:5] == ["exact 100.0", "100.0"]
    assert all(abs(float(row[2]) - float(row[1])) <= 0.5 for row in rows[3:])
    for length in ("short", "long"):
        timed = rows_of(report, f"Timed {length} answers")
        assert [tuple(row[:2]) for row in timed] == expected
        assert {row[-1] for row in timed} == {"0"}, "alone and with drafts they answer as beside the others"


def test_what_is_finished_is_not_asked_or_timed_again(arguments, tmp_path, monkeypatch):
    answered, timed = [], []
    real_answer, real_measure = accuracy.answer_all, speed.measure
    monkeypatch.setattr(
        accuracy, "answer_all", lambda *given, **more: answered.append(1) or real_answer(*given, **more)
    )
    monkeypatch.setattr(
        speed, "measure", lambda *given, **more: timed.append(given[2].name) or real_measure(*given, **more)
    )
    asked = arguments("--no-figure", baselines="sdpa", methods="scout")
    assert main(asked) == 0
    assert len(answered) == 2
    assert sorted(set(timed)) == ["HF generate, sdpa", "own loop", "scout@10"]
    whole = (tmp_path / "out" / "report.md").read_text()
    whole_count = len(timed)
    for name in ("results.jsonl", "times.jsonl"):  # as a kill leaves them while the second question is written
        path = tmp_path / "out" / name
        path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "out" / "report.md").unlink()
    answered.clear()
    timed.clear()
    assert main(asked) == 0
    assert len(answered) == 1
    assert 0 < len(timed) < whole_count
    # The first question keeps its times, so its table is the same; the second question's is measured again.
    report = (tmp_path / "out" / "report.md").read_text()
    assert rows_of(report, "Timed short answers") == rows_of(whole, "Timed short answers")
    assert {row[-1] for row in rows_of(report, "Timed long answers")} == {"0"}
    assert not (tmp_path / "out" / "figure.png").exists()
    answered.clear()
    timed.clear()
    written = report.split("```")[1].split()
    assert main(written[1:]) == 0  # the command in the report asks for the same
    assert (tmp_path / "out" / "report.md").read_text() == report
    assert not answered
    assert not timed


def test_what_cannot_be_compared_is_refused(refused, arguments, tmp_path):
    refused(*arguments(methods="fastw"), words=("method 'fastw'", "must be one of", "twigvlm methods"))
    refused(*arguments(methods="cdpruner:3"), words=("takes no layer",))
    refused(*arguments(methods="base"), words=("nothing to compare",))
    refused(*arguments(budgets=3, methods=["fastv", "twig"]), words=("method 'fastv': retain=3", "method 'twig'"))
    refused(*arguments(budgets=99), words=("method 'fastv': retain=99",))
    refused(*arguments(repeats=0), words=("repeats=0",))
    refused(*arguments(timed=-1), words=("timed=-1",))
    assert not (tmp_path / "out").exists()
    refused(*arguments(twig=None, methods=["fastv", "twig"]), words=("needs a twig",))
    refused(*arguments(twig=None, speculate="chain"), words=("needs a twig",))


def test_published_methods_need_no_twig_and_questions_need_not_be_timed(arguments, tmp_path):
    assert main(arguments(twig=None, methods=["fastv", "random:0"], timed=0)) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert [row[0] for row in rows_of(report, "Comparison")] == ["**base**", "fastv", "random:0"]
    assert "speed ratio" not in report
    assert not (tmp_path / "out" / "times.jsonl").exists()


def with_another_picture(tmp_path, data):
    """The short question comes again with a picture of its own, first in the file."""
    questions = tmp_path / "questions.json"
    record = json.loads(questions.read_text())
    (tmp_path / "two.png").write_bytes((tmp_path / "one.png").read_bytes())
    record["questions"].insert(0, {**record["questions"][0], "id": "first", "image": "two.png"})
    questions.write_text(json.dumps(record))
    (tmp_path / "two.png").write_bytes(data)


def test_where_no_timed_question_can_be_asked_the_answers_are_still_reported(arguments, tmp_path):
    asked = arguments("--no-figure", "--kinds", "place", timed=1, baselines="sdpa")
    with_another_picture(tmp_path, b"nothing")
    assert main(asked) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert rows_of(report, "Comparison")[0][3] == "exact 100.0"
    assert "speed ratio" not in report
    assert "## Failed while timed\n\n1 of 1 could not be asked" in report


def test_a_question_that_fails_while_it_is_timed_is_reported(arguments, tmp_path, monkeypatch):
    real, failing = speed.measure, []

    def measure(model, inputs, system, longest, assistant=None):
        if longest == 4:  # the long one
            failing.append(system.name)
            raise MemoryError
        return real(model, inputs, system, longest, assistant)

    monkeypatch.setattr(speed, "measure", measure)
    assert main(arguments("--no-figure")) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert failing
    assert "## Failed\n" not in report
    assert "## Failed while timed\n\n1 of 2 could not be asked" in report
    assert "- 1: there is not enough memory for this question; use smaller pictures, or leave eager out of" in report
    assert "Times are of 1 short answers" in report


def test_without_a_right_answer_there_is_no_figure(capsys, arguments, tmp_path):
    questions = tmp_path / "questions.json"
    asked = arguments(timed=0, limit=1)
    questions.write_text(questions.read_text().replace('"answer": "', '"answer": "not '))
    assert main(asked) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Figure: none, because no answer of the base is right"
    assert "figure.png" not in (tmp_path / "out" / "report.md").read_text()


def test_descriptions_alone_have_no_figure(capsys, arguments, tmp_path):
    questions = tmp_path / "questions.json"
    record = json.loads(questions.read_text())
    asked = [{**row, "kind": "description", "objects": ["cat"]} for row in record["questions"]]
    questions.write_text(json.dumps({"vocabulary": {"cat": ["cat"]}, "questions": asked}))
    assert main(arguments(timed=0)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Figure: none, because descriptions alone have no RelAcc"


def test_an_attention_that_is_not_available_is_refused_before_anything_is_answered(refused, arguments, tmp_path):
    refused(*arguments(baselines=["sdpa", "flash"]), words=("attention 'flash': not available here",))
    assert not (tmp_path / "out").exists()
    assert main(arguments("--no-figure", baselines="flash", timed=0)) == 0


def test_methods_that_the_base_cannot_have_are_named_before_anything_is_answered(
    refused, arguments, tmp_path, monkeypatch
):
    pooling = dataclasses.replace(family_of(tiny_llava()), tower=Tower(pools=True))
    monkeypatch.setattr("twigvlm.base.vlm.family_of", lambda model: pooling)
    line = refused(*arguments("--no-figure", methods=None, budgets=12), words=("methods=mustdrop visionzip fastervlm",))
    assert not (tmp_path / "out").exists()
    rest = line.split("leave them out, and ask for ")[1].split()
    assert rest[:2] == ["twig", "fastv"]
    assert main(arguments("--no-figure", methods=rest, budgets=12, timed=0, limit=1)) == 0


def test_no_methods_named_means_all(arguments, tmp_path):
    from twigvlm.pruning.methods import METHODS as PUBLISHED

    assert main(arguments("--no-figure", methods=None, budgets=12, timed=0, limit=1)) == 0
    rows = rows_of((tmp_path / "out" / "report.md").read_text(), "Comparison")
    published = ["random:0" if name == "random" else name for name in PUBLISHED if name != "fitprune"]
    assert [row[0] for row in rows[1:]] == ["twig", *published]
