"""Requests are refused by the names that the client wrote."""

import json

import pytest

from tests.serving.servers import chat
from twigvlm.serving.errors import RequestError
from twigvlm.serving.protocol import parse_request


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
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages.0.content"),
    ],
)
def test_a_refusal_names_the_field(options, param):
    with pytest.raises(RequestError) as refused:
        parse_request(json.dumps(chat(**options)))
    assert refused.value.param == param
    assert str(refused.value).startswith(f"{param}: ")
