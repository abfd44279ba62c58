import pytest
import torch

from tests.batches import batched
from tests.tiny import prompt
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation import batches, memory
from twigvlm.evaluation.batches import batch_contenders, run_batches, split
from twigvlm.evaluation.journal import Journal
from twigvlm.evaluation.report import batch_sections
from twigvlm.evaluation.summary import compare_batches


def batch_of(questions):
    return batched([prompt(int(question.id)) for question in questions])


def test_every_size_answers_the_same_prompts(model, questions, tmp_path):
    model.model.generation_config.eos_token_id = list(range(0, 100, 3))
    model.model.generation_config.pad_token_id = 0
    contenders = batch_contenders(10, ["sdpa"])
    journal = Journal(tmp_path / "results.jsonl", {})
    records = run_batches(model, questions.items, (1, 4), contenders, batch_of, journal, 12, 12, 1)
    assert [record["id"] for record in records] == ["1-0", "1-1", "1-2", "1-3", "4-0"]
    assert [record["size"] for record in records] == [1, 1, 1, 1, 4]
    alone = [record["runs"] for record in records[:4]]
    for name, run in records[-1]["runs"].items():
        assert run["tokens"] == [one[name]["tokens"][0] for one in alone]
        assert all(seconds > 0 for seconds in run["total"])
        assert len(run["total"]) == len(run["peak"]) == 1
    lengths = {count for one in alone for run in one.values() for count in run["tokens"]}
    assert len(lengths) > 1
    assert max(lengths) <= 12


def test_a_run_goes_on_where_it_was(model, questions, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(
        batches, "_measure", lambda model, inputs, contender, new: order.append(contender.name) or ([1], 1.0, None)
    )
    contenders = batch_contenders(10, ["sdpa"])

    def run(sizes):
        journal = Journal(tmp_path / "results.jsonl", {})
        return run_batches(model, questions.items, sizes, contenders, batch_of, journal, 2, 2, 1)

    first = run((4,))
    assert order == [contender.name for contender in contenders] * 2  # warm-up, then the turn
    order.clear()
    run((4, 2))
    assert len(order) == 3 * len(contenders)
    assert order[: len(contenders)] == order[len(contenders) : 2 * len(contenders)]
    assert order[-1] == contenders[0].name  # another one begins
    order.clear()
    assert run((4,)) == first
    assert order == []


def test_sizes_must_divide(questions):
    assert [len(batch) for batch in split(questions.items, 2)] == [2, 2]
    for size in (0, 3):
        with pytest.raises(TwigVLMError, match=f"{size} does not divide 4"):
            split(questions.items, size)


def test_figures_of_all_rows_together():
    def record(size, number, **runs):
        values = {name: {"tokens": t, "total": s, "peak": p} for name, (t, s, p) in runs.items()}
        return {"id": f"{size}-{number}", "size": size, "runs": values}

    records = [
        record(
            1, 0, a=([6], [1.0, 3.0, 2.0], [10, 30, 20]), b=([6], [1.0] * 3, [5] * 3), twig=([6], [0.5] * 3, [7] * 3)
        ),
        record(1, 1, a=([4], [3.0] * 3, [20] * 3), b=([4], [1.0] * 3, [5] * 3), twig=([4], [0.5] * 3, [None] * 3)),
        record(
            2, 0, a=([6, 4], [1.0] * 3, [40] * 3), b=([6, 4], [2.0] * 3, [8] * 3), twig=([6, 4], [2.0] * 3, [9] * 3)
        ),
    ]
    figures = {(one.name, one.size): one for one in compare_batches(records, ["a", "b"])}
    assert figures["a", 1].speed == 2.0
    assert figures["a", 1].peak == 30
    assert figures["b", 1].is_baseline
    assert figures["twig", 1].relative == 2.0
    assert figures["twig", 1].peak != figures["twig", 1].peak
    assert figures["a", 2].is_baseline
    assert figures["twig", 2].relative == 0.5
    contenders = [batches.Contender("a", "eager"), batches.Contender("b", "sdpa"), batches.Contender("twig")]
    _, text, table = batch_sections(records, contenders)
    assert text.startswith("2 prompts")
    assert "3 alternating repeats" in text
    assert table.splitlines()[2:] == [
        "| a | 2.0 · 0.40 · 0 MiB | 10.0 · **1.00** · 0 MiB |",
        "| b | 5.0 · **1.00** · 0 MiB | 5.0 · 0.50 · 0 MiB |",
        "| twig | 10.0 · 2.00 · – | 5.0 · 0.50 · 0 MiB |",
    ]


def test_the_peak_is_that_of_the_work_alone():
    device = torch.device("cpu")

    def held(megabytes):
        memory.reset_peak(device)
        torch.ones(megabytes << 18)
        return memory.peak(device)

    large, small = held(400), held(1)
    if large is None:
        pytest.skip("this system does not say")
    assert 300 << 20 < large - small < 500 << 20
