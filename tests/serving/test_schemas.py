"""JSON schemas that keep the grammar library busy are refused in time, and hold up no other request."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.servers import chat, served, tiny_service
from tests.serving.test_hostile import post
from twigvlm.serving import trial
from twigvlm.serving.errors import RequestError

TOO_MUCH = "response_format: this schema takes too much work; simplify it"


@pytest.mark.parametrize(
    ("schema", "limits"),
    [
        ({"type": "integer", "multipleOf": 99999989}, {"SECONDS": 1}),
        ({"type": "object", "patternProperties": {f"^p{n}$": {} for n in range(2000)}}, {"SECONDS": 1}),
        ({"type": "string", "pattern": r"(?i)" + r"\p{L}" * 3000}, {"MAX_BYTES": 40_000_000}),
    ],
    ids=["time", "time of many patterns", "memory"],
)
def test_a_schema_that_takes_too_much_is_refused(service, monkeypatch, schema, limits):
    for name, limit in limits.items():
        monkeypatch.setattr(trial, name, limit)
    with pytest.raises(RequestError) as refused:
        service.grammars.compile(schema)
    assert (refused.value.status, refused.value.param, str(refused.value)) == (400, "response_format", TOO_MUCH)


def test_a_schema_is_tried_once(service, monkeypatch):
    schema = {"type": "object", "properties": {"price": {"type": "number", "multipleOf": 0.01}}}
    assert service.grammars.compile(schema)
    monkeypatch.setattr(sys, "executable", "nowhere")
    assert service.grammars.compile(schema)
    with pytest.raises(FileNotFoundError):
        service.grammars.compile({"type": "array"})


def test_what_a_schema_was_refused_for_is_remembered(monkeypatch):
    schema = json.dumps({"type": "integer", "multipleOf": 99999989})
    monkeypatch.setattr(trial, "SECONDS", 1)
    for executable in (sys.executable, "nowhere"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(trial.TooMuchWork):
            trial.try_schema(schema)


def test_a_trial_that_ran_out_of_time_is_repeated(monkeypatch):
    """The machine may have been busy."""
    monkeypatch.setattr(trial, "_PATIENCE", 0)
    with pytest.raises(trial.TooMuchWork):
        trial.try_schema('{"type": "null"}')
    monkeypatch.undo()
    trial.try_schema('{"type": "null"}')


def test_what_is_wrong_with_a_trial_itself_is_no_fault_of_the_schema(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeError, match=r"(?s)schemas cannot be tried: .*ModuleNotFoundError"):
        trial.try_schema('{"type": "boolean"}')


def test_a_schema_on_trial_holds_up_no_other_request(monkeypatch):
    service, begun, released = tiny_service(), threading.Event(), threading.Event()
    monkeypatch.setattr(service, "check_schema", lambda request: (begun.set(), released.wait(60)))
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}
    with served(service) as address, ThreadPoolExecutor(1) as pool:
        tried = pool.submit(post, address, chat(response_format=form))
        try:
            assert begun.wait(20)
            assert post(address, chat(max_completion_tokens=1))[0] == 200
            assert not tried.done()
        finally:
            released.set()
        assert tried.result()[0] == 200
