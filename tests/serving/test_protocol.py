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
        {"prompt_cache_options": {"ttl": "1h"}},
        {"top_p": 0},
    ],
)
def test_what_asks_for_nothing_is_taken(options):
    assert parse_request(json.dumps(chat(**options)).encode())


@pytest.mark.parametrize("name", ["fit_budget", "retain_per_image", "scout", "diverse", "details"])
def test_null_leaves_a_switch_off(name):
    assert getattr(parse_request(json.dumps({**chat(), name: None}).encode()), name) is False
    assert refusal({**chat(), name: "yes"}).param == name


def test_null_leaves_the_options_of_a_stream_off():
    options = {"include_usage": None, "include_obfuscation": None}
    request = parse_request(json.dumps(chat(stream=True, stream_options=options)).encode())
    assert request.stream_options.include_usage is False


@pytest.mark.parametrize("detail", ["auto", "low", "high", "original", None])
def test_how_closely_an_image_is_looked_at_is_the_base_s_choice(detail):
    parse_request(json.dumps(asked([image_part(detail)])).encode())
    assert refusal(asked([image_part("fine")])).param == "messages.0.content.0.image_url.detail"


def image_part(detail):
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": detail}}


def test_hints_for_a_cache_of_prompts_are_ignored():
    hint = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    parse_request(json.dumps(asked([{"type": "text", "text": "a", **hint}, {**image_part(None), **hint}])).encode())


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}, {"type": "null"}),
    ],
)
def test_the_schema_of_an_answer(form, schema):
    assert parse_request(json.dumps(chat(response_format=form)).encode()).answer_schema == schema


def test_a_schema_that_is_announced_must_be_there():
    error = refusal(chat(response_format={"type": "json_schema"}))
    assert (error.param, str(error)) == ("response_format", "response_format: needs json_schema")


@pytest.mark.parametrize("calls", [{}, {"tool_calls": None}, {"tool_calls": []}])
def test_an_empty_answer_goes_back_as_it_came(calls):
    assert parse_request(json.dumps(asked(None, "assistant", **calls)).encode()).messages[0].content == ""
    assert refusal(asked(None)).param == "messages.0.content"


def test_an_address_beyond_ascii_is_refused():
    """Python would keep four bytes for each of its characters."""
    error = refusal(asked([{"type": "image_url", "image_url": {"url": "data:image/png;base64,\U0001f600"}}]))
    assert error.param == "messages.0.content.0.image_url.url"
    assert "must be ASCII; write other characters as %XX" in str(error)
