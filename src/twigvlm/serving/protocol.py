"""Requests in the format of OpenAI's chat completions API, with the options of this library as further fields."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from twigvlm.config import Speculate
from twigvlm.serving.errors import RequestError

MAX_STOPS, MAX_STOP_LENGTH, MAX_MESSAGES, MAX_PARTS = 4, 200, 512, 256
MAX_SCHEMA = 50_000  # characters
MAX_MARKS = 100_000
"""Largest number of commas and opening brackets in a body, including its texts: each takes time to parse, uninterrupted."""
_MANY = 1000
"""With more faults than this, a message only gives their number: pydantic lists either all of them or none."""

_Positive = Annotated[int, Field(ge=1, le=2**31)]
_Ignored = Annotated[Any, AfterValidator(lambda _: None)]
"""A field that is accepted and ignored. Its value is dropped, so that waiting requests hold no memory for it."""
_Flag = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
"""A switch that is off by default; null leaves it off."""

_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
"""OpenAI's fields that this server does not support, with the values that ask for nothing and are accepted."""


_OF_ANSWERS: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}
"""Fields of an answer's message, with values that mean nothing and are dropped: clients send answers back unchanged."""

_MEANT = {
    "model_type": "must be a JSON object",
    "union_tag_invalid": "type must be 'text' or 'image_url'",
    "union_tag_not_found": "type must be 'text' or 'image_url'",
    "string_pattern_mismatch": "must be ASCII; write other characters as %XX",
    "extra_forbidden": "this server knows no such field; leave it out",
}
"""Messages for clients, by pydantic's type of error."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: _Ignored = None


class ImageAddress(_Strict):
    """Where an image is: a data URI, or an address on a host that the server may fetch from."""

    # Of a text beyond ASCII Python keeps up to four bytes for each character.
    url: Annotated[str, Field(pattern=r"\A[[:ascii:]]*\z")]
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Accepted and ignored: the base's processor decides the resolution."""


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageAddress
    prompt_cache_breakpoint: _Ignored = None


_Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(max_length=MAX_PARTS)]
    name: str | None = None
    """Accepted and ignored: chat templates do not use names."""

    @model_validator(mode="before")
    @classmethod
    def _as_asked(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        said = {name: value for name, value in message.items() if value not in _OF_ANSWERS.get(name, ())}
        if said.get("role") == "assistant" and said.get("content") is None:
            said["content"] = ""  # an answer that was empty
        return said

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The content as a list of parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Strict):
    """What a stream reports in addition to the answer."""

    include_usage: _Flag = False
    include_obfuscation: _Flag = False
    """Accepted and ignored."""


class JsonSchema(_Strict):
    """A schema that the answer must follow."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "JsonSchema":
        if (length := len(json.dumps(self.schema_))) > MAX_SCHEMA:
            raise ValueError(f"a schema of {length:,} characters is longer than {MAX_SCHEMA:,}")
        return self


class ResponseFormat(_Strict):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("needs json_schema")
        return self


class ChatRequest(_Strict):
    """A request for a chat completion. Fields of type `_Ignored` are accepted and have no effect."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: _Positive | None = None
    max_tokens: _Positive | None = None
    max_completion_tokens: _Positive | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    response_format: ResponseFormat | None = None

    retain: float | None = None
    """R̄, average number of visual tokens over all layers; null: no pruning."""
    keep: _Positive | None = None
    """R, visual tokens kept after the twig's trunk, instead of an average."""
    fit_budget: _Flag = False
    """Whether a budget that is impossible for the images is replaced by the nearest possible one, as the server's own is."""
    final_wipe: _Positive | None = None
    """K_f: after this layer only `final_share` of the kept visual tokens remain."""
    final_share: float | None = None
    """φ: share of the kept visual tokens that stay after layer K_f."""
    refocus: float | None = None
    """τ, below which the kept visual tokens are chosen again."""
    retain_per_image: _Flag = False
    """Whether the budget is split evenly among the images."""
    scout: _Flag = False
    """Whether the visual tokens are ranked before the decoder, so that all of its layers hold only the kept ones."""
    diverse: _Flag = False
    """Whether the kept visual tokens also differ from each other."""
    pruner: str | None = None
    """Name of a pruning method to use instead of the twig's."""
    speculate: Speculate | None = None
    """How tokens are drafted; in float32 the answer does not depend on it."""
    details: _Flag = False
    """Whether the answer reports which tokens were drafted and which visual tokens were kept."""

    user: _Ignored = None
    metadata: _Ignored = None
    store: _Ignored = None
    service_tier: _Ignored = None
    safety_identifier: _Ignored = None
    prompt_cache_key: _Ignored = None
    prompt_cache_options: _Ignored = None
    prompt_cache_retention: _Ignored = None
    parallel_tool_calls: _Ignored = None

    audio: Any = None
    frequency_penalty: Any = None
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    modalities: Any = None
    prediction: Any = None
    presence_penalty: Any = None
    reasoning_effort: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        for name, idle in _NOT_OFFERED.items():
            if getattr(self, name) not in idle:
                raise ValueError(f"{name}: is not offered by this server; leave it out")
        stops = self.stops
        if len(stops) > MAX_STOPS or any(not 1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise ValueError(f"stop: must be up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
        limits = (self.max_tokens, self.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            raise ValueError("max_tokens and max_completion_tokens: give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream=true; leave it out")
        for message in self.messages:
            if message.role != "user" and any(isinstance(part, ImagePart) for part in message.parts):
                raise ValueError(f"messages: only users can show images, not the role {message.role!r}")
        return self

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow; None: the answer is free text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object" or form.json_schema is None:
            return {"type": "object"}
        return form.json_schema.schema_

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer and are not part of it."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def parse_request(body: bytes) -> ChatRequest:
    """Parse a request from JSON.

    Raises:
        RequestError: it is not JSON, or not a request that this server supports.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_MARKS:
        raise RequestError(f"the request has more than {MAX_MARKS:,} commas and brackets; send less", 413)
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        if (count := error.error_count()) > _MANY:
            raise RequestError(f"the request has {count:,} faults, such as unknown fields; correct them") from None
        fault = _first_fault(error)
        path, text = _path(fault["loc"]), str(fault["msg"]).removeprefix("Value error, ")
        text = _MEANT.get(fault["type"], text)
        named = text.partition(":")[0]  # of errors of the whole request, which has no path
        param = path or (named if named in ChatRequest.model_fields else None)
        raise RequestError(f"{path}: {text}" if path else text, param=param) from None


def _first_fault(error: ValidationError) -> Any:
    """The first fault in pydantic's list. Where text or a list is allowed, pydantic first says that it is no text, and then what
    is wrong with it as a list; the latter is returned."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    union = faults[0]["loc"][:-1]
    if faults[0]["loc"][-1:] != ("str",):
        return faults[0]
    return max((fault for fault in faults if fault["loc"][: len(union)] == union), key=lambda fault: len(fault["loc"]))


def _path(steps: Sequence[int | str]) -> str | None:
    """The name of the field at a path, without pydantic's names of union members; None: the whole request.

    Args:
        steps: the path, as pydantic gives it.
    """
    found = []
    for number, step in enumerate(map(str, steps)):
        member = number > 0 and (step == "str" or step.startswith("list["))  # a field of this name can only come first
        if not member and not (number > 1 and str(steps[number - 2]).startswith("list[tagged-union")):
            found.append(step)
    return ".".join(found)[:100] or None
