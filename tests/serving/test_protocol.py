"""Requests are refused by the names that the client wrote."""

import json

import pytest

from tests.serving.servers import chat
from twigvlm.serving.errors import RequestError
from twigvlm.serving.protocol import ChatRequest, parse_request


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream_options": {"strange": True}}, "stream_options.strange"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"text": {}}, "text"),
        ({"image_url": "x"}, "image_url"),
        ({"list[": 1}, "list["),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"strict": 3}}},
            "response_format.json_schema.strict",
        ),
        # what pydantic adds to a path is left out
        ({"stop": 3}, "stop"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages.0.content.0.text"),
    ],
)
def test_a_refusal_names_the_field(options, param):
    with pytest.raises(RequestError) as refused:
        parse_request(json.dumps(chat(**options)).encode())
    assert refused.value.param == param
    assert str(refused.value).startswith(f"{param}: ")


def refusal(body):
    with pytest.raises(RequestError) as refused:
        parse_request(body if isinstance(body, bytes) else json.dumps(body).encode())
    return refused.value


def asked(content, role="user", **more):
    return chat(messages=[{"role": role, "content": content, **more}])


@pytest.mark.parametrize(
    "body",
    [
        f"{{{','.join(f'{chr(34)}x{n}{chr(34)}: 1' for n in range(200_000))}}}".encode(),
        b'{"user": [' + b"[],{}," * 200_000 + b"1]}",
        json.dumps(asked([{"type": "text", "text": "a"}] * 200_000)).encode(),
    ],
)
def test_a_body_that_would_take_long_to_parse_is_refused_unparsed(body, monkeypatch):
    monkeypatch.setattr(ChatRequest, "model_validate_json", None)
    assert refusal(body).status == 413


def test_many_faults_are_counted_and_not_listed():
    assert str(refusal({**chat(), **{f"x{n}": 1 for n in range(5000)}})).startswith("the request has 5,000 faults")


def test_a_long_text_with_many_commas_is_a_request():
    assert parse_request(json.dumps(asked("1," * 60_000)).encode()).messages[0].content == "1," * 60_000


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nonsense", chat(max_tokens=1, max_completion_tokens=2)], ids=str)
def test_a_fault_of_no_field_names_none(body):
    assert refusal(body).param is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "refusal", "refusal": "no"}], "messages.0.content.0: type must be 'text' or 'image_url'"),
        ([{"text": "a"}], "messages.0.content.0: type must be 'text' or 'image_url'"),
        (
            [{"type": "image_url", "image_url": "data:image/png;base64,AA"}],
            "messages.0.content.0.image_url: must be a JSON object",
        ),
        ([{"type": "text", "text": "a", "b": 1}], "messages.0.content.0.b: this server knows no such field"),
    ],
)
def test_a_refusal_names_the_part_and_its_fault(content, words):
    assert str(refusal(asked(content))).startswith(words)


@pytest.mark.parametrize(
    "options",
    [
        {"reasoning_effort": None},
        {"reasoning_effort": "none"},
        {"verbosity": "medium"},
        {"prompt_cache_retention": "24h"},
        {"top_p": 0},
    ],
)
def test_what_asks_for_nothing_is_taken(options):
    assert parse_request(json.dumps(chat(**options)).encode())


@pytest.mark.parametrize("calls", [{}, {"tool_calls": None}, {"tool_calls": []}])
def test_an_empty_answer_goes_back_as_it_came(calls):
    assert parse_request(json.dumps(asked(None, "assistant", **calls)).encode()).messages[0].content == ""
    assert refusal(asked(None)).param == "messages.0.content"
