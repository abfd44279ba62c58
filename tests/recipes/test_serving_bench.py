"""The page of the measurements of serving, and the questions that they ask."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("psutil")

from recipes import serving_bench
from recipes.serving_client import Timed
from recipes.serving_questions import quality, questions
from recipes.serving_report import sections


def test_the_page_shows_what_was_measured_and_nothing_else():
    right = {"exact": 90.0, "objects recall": 80.0, "objects precision": 70.0, "texts": 60.0}
    row = {"setting": "no twig", "clients": 4, "requests": 10, "failed": 0, "seconds": 5.0, "tokens": 100}
    row |= {"first p50": 0.5, "first p95": 0.9, "megabytes": 1.0, "quality": right}
    single = {"requests": 10, "seconds": 10.0, "tokens": 100, "quality": right}
    shown = "\n".join(sections({"baseline": single, "load": [row]}))
    assert "| no twig | 4 | 0 | 2.00 | 20.0 | 2.00 | 0.50, 0.90 | 90.0 | 80.0/70.0 | 60.0 |" in shown
    assert "Soak" not in shown
    assert "Faults" not in shown


def test_faults_are_told_in_a_line_each():
    ended = {"requests": 64, "whole": 20, "cut off": 0, "refused": 44, "seconds": 3.0}
    shown = "\n".join(sections({"terminate": ended}))
    assert "20 answers came whole, 0 were cut off, 44 requests were refused" in shown


def test_questions_are_mixed_and_graded_by_their_kind():
    asked = questions(8)
    assert [ask.turn.kind == "description" for ask in asked] == [False, False, False, True] * 2
    found = quality(asked, [ask.turn.answer for ask in asked])
    assert found["exact"] == found["objects recall"] == found["texts"] == 100


def test_a_load_test_goes_on_with_as_many_questions_alone(tmp_path, monkeypatch):
    asked = []
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1e6))
    monkeypatch.setattr(serving_bench, "serving", lambda *options: nullcontext(("address", process)))
    monkeypatch.setattr(serving_bench, "stream", lambda *about: asked.append(about) or Timed("a", 1, 0.1, 0.2))
    monkeypatch.setattr(serving_bench, "CLIENTS", (1,))
    monkeypatch.setattr(serving_bench, "SETTINGS", {"no twig": {}})
    for count, requests in ((2, 1 + 2), (2, 1), (3, 1 + 3)):
        asked.clear()
        serving_bench.load(tmp_path, count)
        assert len(asked) == requests, "one to warm up, and those that were not measured"
    (row,) = json.loads((tmp_path / "load.json").read_text())["figures"]
    assert row["requests"] == 3


def test_conversations_are_shown_with_what_the_cache_changes():
    ways = {"prefix cache": {"first": [0.3, 0.1], "right": 90.0}, "none": {"first": [0.3, 0.4], "right": 90.0}}
    shown = "\n".join(sections({"turns": {"conversations": 2, "answers": 4, "same": 4, "ways": ways}}))
    assert "| prefix cache | 0.30 | 0.10 | 90.0 |" in shown
    assert "| none | 0.30 | 0.40 | 90.0 |" in shown
    assert "4 of 4 answers are the same" in shown
