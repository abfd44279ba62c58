"""The loop of all evaluations: what fails is recorded, and the others go on."""

import pytest
import torch

from tests.evaluation.conftest import inputs_of
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.evaluation.run import one_by_one, run


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_question_that_memory_does_not_suffice_for_fails_and_the_others_go_on(questions, tmp_path, error):
    def measure(item, inputs, number):
        if number == failing:
            raise error
        return {"measured": number}

    def records():
        log = ResultsLog(tmp_path / "results.jsonl", {})
        return run(one_by_one(questions.items), inputs_of, measure, log, "ask for less")

    failing = 0
    with pytest.raises(TwigVLMError, match="not enough memory for this question; ask for less"):
        records()
    failing = 1
    found = records()
    assert found[1]["failed"].startswith("there is not enough memory")
    assert [record["measured"] for record in found if "measured" in record] == [0, 2, 3]


def test_what_is_a_mistake_of_the_program_ends_the_run(questions, tmp_path):
    def measure(item, inputs, number):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(one_by_one(questions.items), inputs_of, measure, ResultsLog(tmp_path / "results.jsonl", {}), "ask for less")
