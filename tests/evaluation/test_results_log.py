import json
import subprocess
import sys

import pytest

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.results_log import ResultsLog, answered, read_records

SETTINGS = {"budgets": (1, 2), "name": "ä"}


def test_a_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    ResultsLog(path, SETTINGS).append({"id": "a", "value": (1,)})
    with path.open("ab") as file:
        file.write('{"id": "b", "given": "δ'.encode()[:-1])  # stopped while it wrote, within a character
    assert read_records(path) == [{"id": "a", "value": [1]}]
    results_log = ResultsLog(path, SETTINGS)
    assert results_log.records == {"a": {"id": "a", "value": [1]}}
    results_log.append({"id": "b\u2028", "value": 2})
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"settings": {"budgets": [1, 2], "name": "ä"}},
        {"id": "a", "value": [1]},
        {"id": "b\u2028", "value": 2},
    ]
    assert list(ResultsLog(path, SETTINGS).records) == ["a", "b\u2028"]


def test_a_failed_question_has_no_results_until_it_is_asked_again(tmp_path):
    path = tmp_path / "results.jsonl"
    results_log, failed = ResultsLog(path, SETTINGS), {"id": "a", "failed": "no such file"}
    assert results_log.append(failed) == results_log.append(failed) == failed
    assert ResultsLog(path, SETTINGS).results("a") is None
    with pytest.raises(TwigVLMError, match="every question failed; no such file"):
        answered([failed, failed])
    results_log.append({"id": "b", "value": 1})
    assert answered(results_log.records.values()) == [{"id": "b", "value": 1}]
    results_log.append({"id": "a", "value": 2})
    assert len(path.read_text().splitlines()) == 4
    assert list(ResultsLog(path, SETTINGS).records.values()) == [{"id": "a", "value": 2}, {"id": "b", "value": 1}]


def test_a_run_that_wrote_nothing_whole_begins_anew(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"sett')
    ResultsLog(path, SETTINGS)
    assert json.loads(path.read_text())["settings"]["budgets"] == [1, 2]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(TwigVLMError, match=r"results.jsonl: Is a directory; choose another output directory"):
        ResultsLog(tmp_path / "results.jsonl", SETTINGS)


@pytest.mark.parametrize("torn", ["", '{"id": "a", "sco'])
def test_settings_without_results_give_way(tmp_path, torn):
    """An option that was refused only after the file was made can be corrected."""
    path = tmp_path / "results.jsonl"
    ResultsLog(path, {**SETTINGS, "seed": "a very long seed"})
    with path.open("a") as file:
        file.write(torn)
    ResultsLog(path, SETTINGS).append({"id": "a"})
    assert ResultsLog(path, SETTINGS).records == {"a": {"id": "a"}}


def test_results_of_other_settings_are_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    ResultsLog(path, SETTINGS).append({"id": "a"})
    before = path.read_text()
    with pytest.raises(TwigVLMError, match=r"other settings \(budgets, seed\)"):
        ResultsLog(path, {"budgets": [3], "name": "ä", "seed": 1})
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["hello", "hello\n", "[1]\n", '{"settings": {}}\n3\n', "\udcff\n"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "results.jsonl"
    data = text.encode(errors="surrogateescape")
    path.write_bytes(data)
    with pytest.raises(TwigVLMError, match="not a file of results"):
        ResultsLog(path, {})
    assert path.read_bytes() == data


OTHER_RUN = """
import sys
from pathlib import Path
from twigvlm.evaluation.results_log import ResultsLog
ResultsLog(Path(sys.argv[1]), {"seed": 1}).append({"id": "b"})
"""


def test_two_runs_do_not_write_to_one_file(tmp_path):
    """The other one would replace settings that have no results yet, and lose the first result."""
    path = tmp_path / "results.jsonl"
    results_log = ResultsLog(path, {"seed": 0})

    def other_run():
        return subprocess.run([sys.executable, "-c", OTHER_RUN, path], capture_output=True, text=True)

    assert f"{path}: another run is writing there; wait until it ends, or choose" in other_run().stderr
    results_log.append({"id": "a"})
    assert "another run" in other_run().stderr
    assert ResultsLog(path, {"seed": 0}).records == {"a": {"id": "a"}}
    del results_log
    path.unlink()
    assert other_run().returncode == 0
    assert read_records(path) == [{"id": "b"}]
