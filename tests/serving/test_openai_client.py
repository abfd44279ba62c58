"""The official client, against a server on a tiny model."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import APIStatusError, AuthenticationError, NotFoundError, OpenAI

from tests.serving.servers import NAME, chat, decoded, expected, inputs_of, picture, served, tiny_service
from tests.tiny import tiny_llava
from twigvlm import TwigVLM
from twigvlm.errors import TwigVLMError
from twigvlm.images import load_image
from twigvlm.inputs import build_inputs
from twigvlm.serving.app import create_app


def ask(client, *arguments, extra=None, **options):
    return client.chat.completions.create(**chat(*arguments, **options), extra_body=extra)


def text_of(completion):
    return completion.choices[0].message.content


def kept_by(service, question, images, **options):
    """Which visual tokens `generate` keeps, counted from the first one."""
    inputs = inputs_of(service, question, images)
    first = int(service.model.base.visual_mask(inputs["input_ids"])[0].int().argmax())
    output = service.model.generate(**inputs, **options, max_new_tokens=1, return_dict_in_generate=True)
    return (output.kept_indices[0] - first).tolist()


def test_the_answer_is_that_of_a_single_run(client, service):
    completion = ask(client, "what is it?", [picture()])
    ids = expected(service, "what is it?", [picture()], max_new_tokens=12)
    assert text_of(completion) == decoded(service, ids)
    assert completion.usage.completion_tokens == len(ids)
    assert completion.usage.prompt_tokens_details.visual_tokens == 16


@pytest.mark.parametrize("way", ["none", "chain", "tree"])
def test_drafts_change_no_answer_and_are_counted(client, service, way):
    completion = ask(client, "hello", [picture("blue")], extra={"speculate": way, "retain": 8})
    ids = expected(service, "hello", [picture("blue")], max_new_tokens=12, retain=8)
    assert text_of(completion) == decoded(service, ids)
    details = completion.usage.completion_tokens_details
    assert (details.drafted_tokens > 0) == (way != "none")
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == details.drafted_tokens
    assert completion.usage.prompt_tokens_details.average_visual_tokens == pytest.approx(8, abs=0.7)


def test_a_stream_brings_the_same_text_and_the_usage(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    whole = ask(client, "tell me", [picture()])
    chunks = list(ask(client, "tell me", [picture()], **options, extra={"speculate": "chain"}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text_of(whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_images_turns_and_roles(client, service):
    image = {"type": "image_url", "image_url": {"url": picture("green"), "detail": "low"}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": [image, image, {"type": "text", "text": "and these?"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "ok"},
    ]
    completion = client.chat.completions.create(model=NAME, messages=messages, max_tokens=12)
    assert completion.usage.prompt_tokens_details.visual_tokens == 32
    shown = [{"type": "image", "image": load_image(picture("green"))} for _ in range(2)]
    turns = [
        ("system", [{"type": "text", "text": "be brief"}]),
        ("user", [*shown, {"type": "text", "text": "and these?"}]),
        ("assistant", [{"type": "text", "text": "two"}]),
        ("user", [{"type": "text", "text": "ok"}]),
    ]
    asked = [{"role": role, "content": content} for role, content in turns]
    inputs = build_inputs(service.processor, [asked], service.model.device, torch.float32)
    length = inputs["input_ids"].shape[1]
    output = service.model.generate(**inputs, eos_token_id=service.eos, max_new_tokens=12)
    assert completion.usage.prompt_tokens == length
    assert text_of(completion) == decoded(service, output[0, length:].tolist())


def test_answers_go_back_into_the_conversation_as_they_came(client):
    asked = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model=NAME, messages=asked, max_tokens=6).choices[0].message
    texts = set()
    for turn in (answer, answer.model_dump(), {"role": "assistant", "content": answer.content}):
        messages = [*asked, turn, {"role": "user", "content": "ok"}]
        texts.add(text_of(client.chat.completions.create(model=NAME, messages=messages, max_tokens=6)))
    assert len(texts) == 1


def test_seeds_and_several_choices(client):
    options = {"temperature": 1.5, "seed": 7, "top_p": 0.95}
    first = ask(client, n=3, **options)
    again = ask(client, **options, extra={"speculate": "chain"})
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert text_of(again) == texts[0]
    assert text_of(ask(client, **{**options, "seed": 8})) == texts[1]
    assert first.usage.completion_tokens == 3 * again.usage.completion_tokens


def test_a_temperature_too_small_to_divide_by_is_greedy(client):
    assert text_of(ask(client, temperature=1e-300, seed=1)) == text_of(ask(client))


@pytest.mark.parametrize("options", [{"top_p": 0.95}, {"top_p": 1}, {"n": 2}])
def test_what_asks_for_sampling_is_sampled_at_openai_s_temperature(client, options):
    answers = ask(client, **options, seed=7).choices
    assert [one.message.content for one in answers] == [
        one.message.content for one in ask(client, **options, seed=7, temperature=1).choices
    ]
    assert answers[-1].message.content != text_of(ask(client))


def test_a_share_of_no_probability_is_greedy(client):
    assert text_of(ask(client, top_p=0, temperature=1.5, seed=7)) == text_of(ask(client))


def test_stop_texts_end_an_answer_and_are_no_part_of_it(client, service):
    whole = text_of(ask(client, "hello", [picture("blue")]))
    stop = whole[4:6]
    for extra in ({"speculate": "none"}, {"speculate": "tree"}):
        completion = ask(client, "hello", [picture("blue")], stop=[stop, "nowhere"], extra=extra)
        assert text_of(completion) == whole[: whole.index(stop)]
        assert completion.choices[0].finish_reason == "stop"
    chunks = ask(client, "hello", [picture("blue")], stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[: whole.index(stop)]


def test_an_answer_follows_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    answers = set()
    for way in ("none", "chain"):
        completion = ask(client, "answer", response_format=form, max_completion_tokens=40, extra={"speculate": way})
        answers.add(text_of(completion))
        assert completion.choices[0].finish_reason == "stop"
    (answer,) = answers
    found = json.loads(answer)
    assert set(found) == {"a", "b"}
    assert found["b"] in "xy"


def test_details_tell_origins_and_kept_patches(client):
    extra = {"details": True, "keep": 5, "refocus": 0.9, "speculate": "tree"}
    completion = ask(client, "look", [picture()], extra=extra, max_completion_tokens=30)
    details = completion.choices[0].twigvlm
    assert "".join(piece["text"] for piece in details["pieces"]) == text_of(completion)
    assert {piece["drafted"] for piece in details["pieces"]} == {True, False}
    assert len(details["kept"]) > 1
    assert all(len(kept) == 5 and set(kept) <= set(range(16)) for kept in details["kept"])
    assert len(set(map(tuple, details["kept"]))) > 1
    assert completion.usage.prompt_tokens_details.kept_visual_tokens == 5
    chunks = [*ask(client, "look", [picture()], extra=extra, max_completion_tokens=30, stream=True)]
    streamed = [chunk.choices[0].twigvlm["kept"] for chunk in chunks if "kept" in _details(chunk)]
    assert streamed == details["kept"]


def test_requests_choose_how_tokens_are_kept(client, service):
    """Scouting keeps the same tokens as the cut after layer K, at its own price, and each request has its own options."""
    plain, diverse, scouted = (
        ask(client, "look", [picture()], extra={"details": True, "keep": 5, **options}, max_completion_tokens=4)
        for options in ({}, {"diverse": True}, {"diverse": True, "scout": True})
    )
    assert diverse.choices[0].twigvlm["kept"] == scouted.choices[0].twigvlm["kept"]
    for completion, options in ((plain, {}), (diverse, {"diverse": True})):
        assert completion.choices[0].twigvlm["kept"] == [kept_by(service, "look", [picture()], keep=5, **options)]
    averages = [one.usage.prompt_tokens_details.average_visual_tokens for one in (plain, diverse, scouted)]
    assert averages[0] == averages[1] == round((16 * 2 + 5 * 4) / 6, 2)
    assert averages[2] == round(5 + 16 * 2 / 6, 2)  # all layers on the kept tokens, and the trunk once on all of them
    with pytest.raises(APIStatusError, match="give only one of them"):
        ask(client, "look", [picture()], extra={"keep": 5, "diverse": True, "retain_per_image": True})


def _details(chunk):
    return getattr(chunk.choices[0], "twigvlm", {})


def test_many_clients_get_what_each_would_get_alone(client, service):
    questions = [f"question {number}" for number in range(12)]

    def one(question):
        way = ("none", "chain", "tree")[len(question) % 3]
        return text_of(ask(client, question, [picture()], extra={"speculate": way}))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, questions))
    for question, answer in list(zip(questions, answers, strict=True))[::4]:
        assert answer == decoded(service, expected(service, question, [picture()], max_new_tokens=12))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"n": 99}, "n: must be 1 to 8"),
        ({"max_completion_tokens": 500}, "context"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, "refuses"),
        ({"images": [picture()], "extra": {"retain": 1000}}, "retain"),
        ({"extra": {"retain": 8, "keep": 4}}, "give only one"),
        ({"extra": {"pruner": "nonsense"}}, "pruner"),
        ({"extra": {"speculate": "nonsense"}}, "speculate"),
        ({"extra": {"pruner": "fastv:²", "retain": 8}}, "pruner"),
        ({"extra": {"pruner": "fastv"}}, "needs a budget"),
        ({"extra": {"pruner": "visionzip:/etc", "retain": 8}}, "requests cannot name directories"),
        ({"extra": {"speculate": "auto"}}, "started with it"),
        ({"extra": {"nonsense": 1}}, "nonsense"),
        ({"images": ["https://example.com/a.png"]}, "nothing is fetched"),
        ({"images": ["/etc/passwd"]}, "data URI"),
        ({"question": "<image>"}, "placeholder"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(client, options, words):
    with pytest.raises(APIStatusError, match=words) as refused:
        ask(client, **options)
    assert refused.value.status_code == 400
    assert refused.value.type == "invalid_request_error"


def test_models_are_listed_and_others_are_unknown(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "twigvlm"
    with pytest.raises(NotFoundError):
        ask(client, model="gpt-9")


def test_other_pruning_methods_by_name(client, service):
    completion = ask(client, "hello", [picture()], extra={"pruner": "fastv:2", "retain": 8})
    ids = expected(service, "hello", [picture()], max_new_tokens=12, pruner="fastv:2", retain=8)
    assert text_of(completion) == decoded(service, ids)
    assert completion.usage.prompt_tokens_details.average_visual_tokens == pytest.approx(8, abs=0.7)


def test_a_model_without_a_twig_serves_what_needs_none():
    service = tiny_service(TwigVLM.without_twig(tiny_llava()))
    with served(service) as address, OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        assert text_of(ask(client, "hello", [picture()], extra={"pruner": "fastv:2", "retain": 8}))
        for extra in ({"retain": 8}, {"speculate": "chain"}):
            with pytest.raises(APIStatusError, match="no twig"):
                ask(client, extra=extra)


def test_keys_are_asked_for(service):
    with served(service, api_key="secret", stop_with_app=False) as address:
        good, bad = (OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) for key in ("secret", "guess"))
        with good, bad:
            assert text_of(ask(good))
            with pytest.raises(AuthenticationError):
                ask(bad)
            with pytest.raises(AuthenticationError) as refused:
                bad.models.list()
            assert refused.value.response.headers["WWW-Authenticate"] == "Bearer"


def test_the_line_break_of_a_file_is_no_part_of_a_key(service):
    with (
        served(service, api_key=" secret\n", stop_with_app=False) as address,
        OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client,
    ):
        assert client.models.list()


@pytest.mark.parametrize("key", ["", " \n"])
def test_an_empty_key_is_refused(service, key):
    with pytest.raises(TwigVLMError, match="api_key: is empty; give a key"):
        create_app(service, key)


def test_a_key_beyond_ascii_is_refused(service):
    with pytest.raises(TwigVLMError, match="api_key: has characters beyond ASCII"):
        create_app(service, "schlüssel")
