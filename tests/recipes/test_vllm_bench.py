"""The tables of the measurements in vLLM, and what their processes are started with."""

import os
from pathlib import Path

import pytest

from recipes import vllm_worker
from recipes.vllm_bench import COLUMNS, summarise
from recipes.vllm_worker import System, serve
from twigvlm.evaluation.questions import Namer, Question


def record(system, rows, prefill, seconds, answers):
    texts = ["a dog"] * len(answers)
    return {
        "system": system, "rows": rows, "first": 0, "prefill": prefill, "seconds": seconds, "ids": answers,
        "texts": texts, "drafts": 2, "accepted": 3,
    }  # fmt: skip


def test_decoding_is_timed_apart_from_prefill_for_one_at_a_time():
    questions = [Question(str(n), Path("x.png"), "Describe.", "", "description", objects=("dog",)) for n in range(2)]
    records = [
        record("vLLM", 1, 0.5, 0.9, [[1] * 5]),
        record("vLLM", 1, 0.7, 1.0, [[1] * 4]),
        record("vLLM", 1, 0.6, 0.6, [[1]]),
        record("vLLM", 2, None, 2.0, [[1] * 5, [1] * 5]),
    ]
    *sections, note = summarise(records, ["vLLM"], questions, Namer({"dog": ["dog"]}))
    column = COLUMNS.index("decode, ms/token")
    cells = [[cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")] for table in sections[1::2]]
    assert [row[column] for row in cells] == ["100.0", "–"]  # 0.7 s for 7 tokens
    assert [row[column - 1] for row in cells] == ["600", "–"]
    assert [len(row) for row in cells] == [len(COLUMNS)] * 2
    assert "it includes as many draft steps as it drafts tokens" in note


def test_systems_stand_in_their_order_whoever_was_asked_first():
    questions = [Question("0", Path("x.png"), "Describe.", "", "description", objects=("dog",))]
    records = [record("drafts", 1, 0.5, 0.5, [[1] * 5]), record("vLLM", 1, 0.5, 1.0, [[1] * 5])]
    _, table, _ = summarise(records, ["vLLM", "drafts", "absent"], questions, Namer({"dog": ["dog"]}))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["vLLM", "5.0", "1.00"], ["drafts", "10.0", "2.00"]]


class Connection:
    """Of a system that is asked nothing."""

    def send(self, _):
        pass

    def recv(self):
        return None


@pytest.mark.parametrize(
    ("options", "chosen", "expected"),
    [
        ({"tokens": 4}, None, "0"),
        ({"overrides": {"twig_scout": {}}}, None, "0"),
        ({"tokens": 4}, "1", "1"),
        ({}, None, None),
    ],
)
def test_what_drafts_or_scouts_runs_on_the_first_runner(monkeypatch, options, chosen, expected):
    environment = {} if chosen is None else {"VLLM_USE_V2_MODEL_RUNNER": chosen}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(vllm_worker, "_vllm", lambda system: None)
    serve(Connection(), System("name", "vllm", "base", "drafter", "twig", **options))
    assert environment.get("VLLM_USE_V2_MODEL_RUNNER") == expected
