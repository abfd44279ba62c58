import dataclasses

import pytest
import torch

from tests.evaluation.conftest import inputs_of
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation import accuracy
from twigvlm.evaluation.accuracy import run_accuracy, score
from twigvlm.evaluation.progress import Progress
from twigvlm.evaluation.questions import Namer, Question
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.evaluation.variants import make_variants


@pytest.fixture
def run(model, tokenizer, questions, tmp_path):
    variants = make_variants(model, ["twig", "random"], [10, 7])

    def again(chosen=questions, advance=lambda record: None):
        results_log = ResultsLog(tmp_path / "results.jsonl", {})
        return run_accuracy(model, tokenizer, chosen, variants, inputs_of, results_log, 6, 8, advance=advance)

    return again


def test_records_answers_and_scores(run):
    running = Progress(max_shown=2)
    records = run(advance=running.add)
    assert [record["id"] for record in records] == ["0", "1", "2", "3"]
    assert [record["kind"] for record in records] == ["place", "place", "place, held out", "description"]
    names = ["none", "twig@10/5", "twig@7/5", "random@10/5", "random@7/5"]
    for record in records:
        assert list(record["given"]) == list(record["score"]) == list(record["kept"])
        assert sorted(record["given"]) == sorted(names)
        assert [record["kept"][name] for name in names] == [16, 9, 3, 9, 3]
    assert [record["score"]["none"] for record in records[:3]] == [1, 1, 1]
    for record in records[:3]:
        for name in names:
            assert record["score"][name] == (record["given"][name].lower() == record["answer"].lower())
    assert records[3]["score"]["none"][1] == 1
    assert str(running).startswith("none 100.0 · twig@10/5 ")
    assert running.asked == 3


def test_a_stopped_run_goes_on(run, questions, monkeypatch):
    whole = run(questions.chosen(limit=2))
    asked = []
    answer_all = accuracy.answer_all
    monkeypatch.setattr(accuracy, "answer_all", lambda *args: asked.append(args) or answer_all(*args))
    records = run()
    assert len(asked) == 2
    assert records[:2] == whole
    assert run() == records
    assert len(asked) == 2


def test_a_question_that_cannot_have_a_budget_fails_and_the_others_go_on(model, tokenizer, questions, tmp_path):
    """Unless it is the first one that is measured, since then most likely none can."""
    variants = make_variants(model, ["fastv"], [10])

    def run(larger):
        def two_pictures(question):  # of which a budget of 10 cannot be had after two of six layers
            inputs = inputs_of(question)
            if question.id != larger:
                return inputs
            joint = {name: torch.cat((inputs[name],) * 2, dim=1) for name in ("input_ids", "attention_mask")}
            return {**joint, "pixel_values": torch.cat((inputs["pixel_values"],) * 2)}

        log = ResultsLog(tmp_path / "results.jsonl", {})
        return run_accuracy(model, tokenizer, questions, variants, two_pictures, log, 2, 2)

    with pytest.raises(TwigVLMError, match="retain=10: must be"):
        run("0")
    records = run("1")
    assert [record["id"] for record in records if "given" in record] == ["0", "2", "3"]
    assert records[1]["failed"].startswith("retain=10: must be")
    assert all("given" in record for record in run(None)), "it is asked again"


def test_where_memory_does_not_suffice_for_all_variants_the_remedy_is_fewer_of_them(run, monkeypatch):
    def answer_all(*given):
        raise MemoryError

    monkeypatch.setattr(accuracy, "answer_all", answer_all)
    with pytest.raises(TwigVLMError, match=r"not enough memory .* fewer --methods or --budgets") as raised:
        run()
    assert "--baselines" not in str(raised.value)


def test_random_choice_differs_between_questions_and_seeds(model, tokenizer, questions, tmp_path, monkeypatch):
    seeds = []
    answer_all = accuracy.answer_all
    monkeypatch.setattr(accuracy, "answer_all", lambda *args: seeds.append(args[-1]) or answer_all(*args))
    variants = make_variants(model, ["random"], [10])
    for seed in (0, 0, 1):
        results_log = ResultsLog(tmp_path / str(len(seeds)), {})
        run_accuracy(model, tokenizer, questions, variants, inputs_of, results_log, 1, 1, seed)
    assert seeds[:4] == seeds[4:8]
    assert len(set(seeds)) == 8


def test_descriptions_count_objects(tmp_path):
    namer = Namer({"dog": ("dog", "dogs"), "cat": ("cat",), "cow": ("cow",)})
    question = Question("a", tmp_path, "?", "…", "description", objects=("dog", "cat"))
    assert score(question, "Two dogs, a cow and a dog.", namer) == [1, 2, 2, 0, 0]
    assert score(question, "Nothing.", namer) == [0, 2, 0, 0, 0]
    written = dataclasses.replace(question, texts=("STOP", "42", "A.B"))
    assert score(written, "A red sign says STOP. Another says 421, one AxB.", namer) == [0, 2, 0, 1, 3]
    assert score(written, "It reads stop, 42 and A.B.", namer)[3:] == [2, 3]
