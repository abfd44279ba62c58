import pytest
import torch
from transformers import GenerationConfig

from tests.batches import batched
from tests.tiny import prompt
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation import batches, peak_memory
from twigvlm.evaluation.batches import batch_systems, run_batches, split, up_to_end
from twigvlm.evaluation.report import batch_sections
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.evaluation.speed import in_turn
from twigvlm.evaluation.summary import compare_batches
from twigvlm.evaluation.systems import System


def batch_of(*questions):
    return batched([prompt(int(question.id)) for question in questions])


def test_every_size_answers_the_same_prompts(model, tokenizer, questions, tmp_path):
    model.model.generation_config.eos_token_id = list(range(0, 100, 3))
    model.model.generation_config.pad_token_id = 0
    systems = batch_systems("twig", 10, ["sdpa"])
    results_log = ResultsLog(tmp_path / "results.jsonl", {})
    records = run_batches(model, tokenizer, questions, (1, 4), systems, batch_of, results_log, 6, 6, 1)
    assert [record["id"] for record in records] == ["1-0", "1-1", "1-2", "1-3", "4-0"]
    assert [record["size"] for record in records] == [1, 1, 1, 1, 4]
    alone = [record["runs"] for record in records[:4]]
    for name, run in records[-1]["runs"].items():
        assert run["tokens"] == [one[name]["tokens"][0] for one in alone]
        assert run["scores"] == [one[name]["scores"][0] for one in alone]
        assert all(seconds > 0 for seconds in run["total"])
        assert len(run["total"]) == 1
        assert run["peak"] is None or run["peak"] > 0
    lengths = {count for one in alone for run in one.values() for count in run["tokens"]}
    assert len(lengths) > 1
    assert max(lengths) <= 6


@pytest.mark.parametrize(
    ("ends", "lengths"), [(None, [4, 4, 4]), (2, [2, 4, 4]), ([2, 7], [2, 1, 4])], ids=["none", "one", "several"]
)
def test_an_answer_ends_with_its_first_end_token(ends, lengths):
    rows = [[1, 2, 2, 0], [7, 0, 0, 0], [1, 1, 1, 1]]
    trimmed = up_to_end(rows, GenerationConfig(eos_token_id=ends))
    assert trimmed == [row[:length] for row, length in zip(rows, lengths, strict=True)]


def test_a_run_goes_on_where_it_was(model, tokenizer, questions, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(
        batches,
        "_measure",
        lambda model, inputs, system, new: order.append(system.name) or ([[1]] * len(inputs["input_ids"]), 1.0),
    )
    systems = batch_systems("twig", 10, ["sdpa"])

    def run(sizes):
        results_log = ResultsLog(tmp_path / "results.jsonl", {})
        return run_batches(model, tokenizer, questions, sizes, systems, batch_of, results_log, 2, 2, 1)

    run((4,))
    everyone = [system.name for system in systems]
    expected = [[system.name for system in in_turn(systems, turn)] for turn in range(3)]
    assert order == [*everyone, *everyone, *expected[0]], "watched, warmed up, timed"
    order.clear()
    run((4, 2))
    assert order == [*everyone, *everyone, *expected[1], *everyone, *expected[2]]


def test_sizes_must_divide(questions):
    assert [len(batch) for batch in split(questions.items, 2)] == [2, 2]
    for size in (0, 3):
        with pytest.raises(TwigVLMError, match=f"{size} does not divide 4"):
            split(questions.items, size)


def test_figures_of_all_rows_together():
    def record(size, number, **runs):
        values = {
            name: {"tokens": t, "scores": [int(n == 6) if size == 2 else number for n in t], "total": s, "peak": p}
            for name, (t, s, p) in runs.items()
        }
        return {"id": f"{size}-{number}", "size": size, "runs": values}

    records = [
        record(1, 0, a=([6], [1.0, 3.0, 2.0], 30), b=([6], [1.0] * 3, 5), twig=([6], [0.5] * 3, 7)),
        record(1, 1, a=([4], [3.0] * 3, 20), b=([4], [1.0] * 3, 5), twig=([4], [0.5] * 3, None)),
        record(2, 0, a=([6, 4], [1.0] * 3, 40), b=([6, 4], [2.0] * 3, 8), twig=([6, 4], [2.0] * 3, 9)),
    ]
    figures = {(one.name, one.size): one for one in compare_batches(records, ["a", "b"])}
    assert figures["a", 1].speed == 2.0
    assert figures["a", 1].peak == 30
    assert figures["b", 1].is_baseline
    assert figures["twig", 1].relative == 2.0
    assert figures["twig", 1].peak != figures["twig", 1].peak
    assert figures["a", 2].is_baseline
    assert figures["twig", 2].relative == 0.5
    systems = [System("a", "eager"), System("b", "sdpa"), System("twig")]
    _, text, table = batch_sections(records, systems)
    assert text.startswith("2 prompts")
    assert "3 alternating repeats" in text
    assert table.splitlines()[2:] == [
        "| a | 2.0 · 0.40 · 0 MiB · exact 50.0 | 10.0 · **1.00** · 0 MiB · exact 50.0 |",
        "| b | 5.0 · **1.00** · 0 MiB · exact 50.0 | 5.0 · 0.50 · 0 MiB · exact 50.0 |",
        "| twig | 10.0 · 2.00 · – · exact 50.0 | 5.0 · 0.50 · 0 MiB · exact 50.0 |",
    ]


def test_a_size_at_which_fewer_prompts_were_answered_is_named():
    runs = {"a": {"tokens": [6], "scores": [1], "total": [1.0], "peak": 1}}
    records = [{"id": "1-0", "size": 1, "runs": runs}, {"id": "1-1", "size": 1, "runs": runs}]
    records.append({"id": "2-0", "size": 2, "runs": {"a": {**runs["a"], "tokens": [6, 6], "scores": [1, 1]}}})
    assert "2 prompts, the same at every size" in batch_sections(records, [System("a", "eager")])[1]
    assert "1 prompts at size 1 and 2 prompts at size 2" in batch_sections(records[1:], [System("a", "eager")])[1]


def test_the_peak_is_that_of_the_work_alone():
    device = torch.device("cpu")

    def held(megabytes):
        peak_memory.reset_peak(device)
        torch.ones(megabytes << 18)
        return peak_memory.peak(device)

    large, small = held(400), held(1)
    if large is None:
        pytest.skip("this system does not say")
    assert 300 << 20 < large - small < 500 << 20
