"""Arguments of another kind than the library takes are refused by name, before any work."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf.wrong_types import calls
from tests.tiny import prompt
from twigvlm import TwigVLMError


@pytest.fixture(scope="module")
def told():
    root = Path(__file__).parents[2]
    program = [sys.executable, "-m", "tests.hf.wrong_types"]
    run = subprocess.run(program, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("message", list(calls(None)))
def test_what_is_of_another_kind_is_named(told, message):
    assert message in told[message]


def scaled(ids, scores, factor=1.0):
    return scores * factor


class Scaled:
    def called(self, ids, scores, factor=1.0):
        return scores * factor


@pytest.mark.parametrize("processor", [scaled, functools.partial(scaled, factor=2.0), Scaled().called])
def test_processors_may_have_further_parameters_with_defaults(model, processor):
    assert model.generate(**prompt(), max_new_tokens=2, logits_processor=[processor]).shape[0] == 1


def test_processors_and_criteria_in_a_tuple(model):
    options = {"logits_processor": (scaled,), "stopping_criteria": (lambda ids, scores: ids.shape[1] > 27,)}
    answer = model.generate(**prompt(), max_new_tokens=9, **options)
    assert answer.tolist() == model.model.generate(**prompt(), max_new_tokens=9, **options).tolist()
    assert answer.shape[1] == 28


def test_a_fork_takes_names_and_no_budget_without_a_pruner(model):
    engine = model.engine()
    request = engine.add(prompt(), max_new_tokens=2)
    with pytest.raises(TwigVLMError, match="retain=8: needs a pruner"):
        engine.fork(request, None, retain=8)
    engine.fork(request, "fastv", retain=8)
