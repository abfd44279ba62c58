import json
import math

import pytest

from twigvlm.cli.main import main
from twigvlm.evaluation import paper_figures
from twigvlm.evaluation.paper_figures import CHOSEN, DRAFTED, Drafted, draw_drafts
from twigvlm.evaluation.token_origins import Origin


def write(path, records):
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"settings": {}}, *records]))
    return path


@pytest.fixture
def times(tmp_path):
    """Raw results of two systems on a short and a long question; twig is twice as fast as the base on the long one."""

    def run(prefill, total, tokens):
        parts = {"prefill": [prefill], "total": [total], "draft": [None], "verify": [None]}
        return {"ids": [1] * tokens, "score": 1, "drafted": [], "accepted": [], **parts}

    rows = [
        {"id": "0", "kind": "place", "long": False, "runs": {"HF generate, sdpa": run(2, 4, 2), "twig": run(1, 4, 2)}},
        {"id": "1", "kind": "rows", "long": True, "runs": {"HF generate, sdpa": run(2, 12, 11), "twig": run(1, 6, 11)}},
    ]
    return write(tmp_path / "times.jsonl", rows)


def drawn(monkeypatch, name):
    """What a function that draws is given, beside drawing it."""
    given, real = [], getattr(paper_figures, name)
    monkeypatch.setattr(paper_figures, name, lambda *some: given.append(some) or real(*some))
    return given


def test_times_and_speeds_are_drawn_from_raw_results(times, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    given = drawn(monkeypatch, "draw_times")
    assert main(["figures", "times", "--results", str(times), "--out", str(tmp_path / "times.png")]) == 0
    ((speeds, lengths, _),) = given
    assert list(speeds) == ["HF generate, sdpa", "twig"]
    assert (speeds["twig"].prefill, speeds["twig"].decode, speeds["twig"].tokens) == (1, 5, 11), "the long one alone"
    assert lengths == (10, 50, 100, 200)
    given = drawn(monkeypatch, "draw_speeds")
    words = ["figures", "speeds", "--results", str(times), "--systems", "twig", "--out", str(tmp_path / "speeds.png")]
    assert main(words) == 0
    ((panels, _),) = given
    assert {title: [one.relative for one in some] for title, some in panels.items()} == {
        "long answers": [2],
        "short answers": [1],
    }
    assert all((tmp_path / name).exists() for name in ("times.png", "speeds.png"))


def test_speeds_are_resampled_by_pictures(times, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    record = json.loads(times.read_text().splitlines()[1])
    intervals = []
    for pictures in (10, 5):
        rows = [{**record, "id": str(number), "picture": number % pictures} for number in range(20)]
        given = drawn(monkeypatch, "draw_speeds")
        results = write(tmp_path / "many.jsonl", rows)
        assert main(["figures", "speeds", "--results", str(results), "--out", str(tmp_path / "speeds.png")]) == 0
        intervals.append(given[0][0]["short answers"][1].interval)
    assert intervals[0] == (1, 1)
    assert math.isnan(intervals[1][0])


def test_accuracy_is_drawn_by_training_samples(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for samples, right in ((100, 1), (1000, 3)):
        rows = [
            {
                "id": str(number),
                "kind": "place",
                "score": {"none": 1, "twig@64/24": int(number < right), "fastv@64": 0},
                **{part: {"none": 1, "twig@64/24": 1, "fastv@64": 1} for part in ("kept", "average", "ran")},
            }
            for number in range(4)
        ]
        write(tmp_path / f"{samples}.jsonl", rows)
    given = drawn(monkeypatch, "draw_samples")
    results = [f"{samples}={tmp_path / f'{samples}.jsonl'}" for samples in (1000, 100)]
    assert main(["figures", "samples", "--results", *results, "--out", str(tmp_path / "samples.png")]) == 0
    ((by_samples, names, _),) = given
    assert names == ["twig@64/24", "fastv@64"]
    assert {samples: figures[1].relative for samples, figures in by_samples.items()} == {100: 0.25, 1000: 0.75}
    assert (tmp_path / "samples.png").exists()


def test_what_cannot_be_drawn_is_refused(refused, times, tmp_path):
    (tmp_path / "nothing.jsonl").write_text("{}\n")
    answers = write(tmp_path / "answers.jsonl", [{"id": "0", "score": {"none": 1}}])
    refused("figures", "times", "--results", tmp_path / "no.jsonl", words=("no.jsonl", "give a file of raw results"))
    refused("figures", "times", "--results", tmp_path / "nothing.jsonl", words=("holds no raw results",))
    refused("figures", "speeds", "--results", answers, words=("no times",))
    refused("figures", "times", "--results", times, "--kinds", "count", words=("kind 'count'", "place, rows"))
    refused("figures", "times", "--results", times, "--systems", "a", words=("system 'a'", "HF generate, sdpa, twig"))
    refused("figures", "times", "--results", times, "--lengths", "0", words=("lengths",))
    refused("figures", "times", "--results", times, "--out", "x.gif", words=("x.gif",))
    refused("figures", "samples", "--results", times, words=("SAMPLES=FILE",))
    refused("figures", "samples", "--results", f"10={times}", words=("no answers",))
    parts = {part: {"none": 1, "fastv@64": 1} for part in ("kept", "average", "ran")}
    wrong = {"id": "0", "kind": "place", "score": {"none": 0, "fastv@64": 1}, **parts}
    answers = write(tmp_path / "answers.jsonl", [wrong])
    out = tmp_path / "samples.png"
    refused("figures", "samples", "--results", f"10={answers}", "--out", out, words=("no answer of the base is right",))
    assert not out.exists()


def test_tokens_are_coloured_by_who_found_them():
    answer = Drafted("What?", ["iiiiii", "llllll\n", "iii"], [Origin(0, False), Origin(1, True), Origin(1, False)])
    picture = draw_drafts([answer, answer], width=400)
    colours = {colour: count for count, colour in picture.getcolors(picture.width * picture.height)}
    assert colours[DRAFTED] > 100
    assert colours[CHOSEN] > 100
    assert draw_drafts([answer], width=400).height < picture.height
    narrow = draw_drafts([answer], width=60)
    assert narrow.height > draw_drafts([answer], width=400).height, "what does not fit goes into another line"


@pytest.fixture
def asked(tmp_path, picture, base_directory, twig_directory):
    row = {"image": picture.name, "question": "What?", "answer": "a", "kind": "place"}
    (tmp_path / "questions.json").write_text(json.dumps({"questions": [{"id": str(n), **row} for n in range(4)]}))
    words = {"questions": tmp_path / "questions.json", "model": base_directory, "twig": twig_directory, "device": "cpu"}
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def test_maps_of_several_questions_lie_below_each_other(asked, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    given = drawn(monkeypatch, "draw_maps")
    assert main(["figures", "attention", *asked, "--limit", "2", "--out", str(tmp_path / "maps.png")]) == 0
    ((seen, _),) = given
    assert [one.question for one in seen] == ["What?"] * 2
    titles = ["attention of the last twig layer", "attention of base layer 2 (K)", "attention of base layer 4 of 6"]
    assert list(seen[0].maps) == titles
    assert all(scores.shape == (4, 4) for scores in seen[0].maps.values())
    assert (tmp_path / "maps.png").exists()


def test_drafts_of_answers_are_drawn(asked, refused, tmp_path, monkeypatch):
    given = drawn(monkeypatch, "draw_drafts")
    assert main(["figures", "drafts", *asked, "--max-new-tokens", "6", "--out", str(tmp_path / "drafts.png")]) == 0
    ((answers,),) = given
    assert len(answers) == 3
    assert all(len(one.pieces) == len(one.origins) == 6 for one in answers)
    assert (tmp_path / "drafts.png").exists()
    refused("figures", "drafts", *asked, "--speculate", "none", words=("nothing would be drafted",))
