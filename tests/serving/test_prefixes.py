"""Requests that begin as an earlier one compute only what is new, and get the answers that they get alone."""

import queue

import pytest
import torch

from tests.serving.servers import NAME, chat, decoded, expected, picture, tiny_model, tiny_service
from tests.serving.test_worker import outcome, value
from twigvlm.errors import TwigVLMError
from twigvlm.inputs import build_inputs, user_turn
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.serving.limits import Limits
from twigvlm.serving.protocol import ChatRequest

PRUNINGS = {
    "unpruned": {},
    "twig": {"retain": 8},
    "refocus": {"retain": 8, "refocus": 0.9},
    "scout": {"retain": 10, "scout": True},
    "before the decoder": {"retain": 8, "pruner": "visionzip"},
    "in the decoder": {"retain": 10, "pruner": "fastv"},
}


@pytest.fixture
def start():
    """Makes services that end with the test."""
    made = []

    def make(**limits):
        made.append(tiny_service(limits=Limits(**limits)))
        return made[-1]

    yield make
    for service in made:
        service.stop()


def ask(service, body):
    """The ids of an answer, and how many tokens of its prompt were known."""
    events = queue.Queue()
    request = ChatRequest.model_validate(body)
    job = service.prepare(request, events.put)
    service.worker.submit(job)
    return outcome(events), job.choices[0].counts.cached


def outcomes(events, count):
    """The ids of several answers to one request."""
    answers, left = [[] for _ in range(count)], count
    while left:
        event = events.get(timeout=10)
        answers[event.choice] += [token for token, _ in event.tokens]
        left -= event.finished
    return answers


@pytest.mark.parametrize("options", PRUNINGS.values(), ids=PRUNINGS)
@pytest.mark.parametrize("way", ["none", "chain"])
def test_a_next_turn_computes_what_is_new(start, options, way):
    service, options = start(), {**options, "speculate": way}
    first = chat("what is it?", [picture()], **options)
    ids, cached = ask(service, first)
    assert cached == 0
    said = {"role": "assistant", "content": decoded(service, ids)}
    messages = [*first["messages"], said, {"role": "user", "content": [{"type": "text", "text": "and where?"}]}]
    ids, cached = ask(service, {**first, "messages": messages})
    alone, _ = ask(start(prefix_bytes=0), {**first, "messages": messages})
    assert ids == alone
    whole_prompt_in_trunk = "scout" not in options and "pruner" not in options
    assert (cached > 16) == whole_prompt_in_trunk


@pytest.mark.parametrize("name", ["scout", "before the decoder", "in the decoder"])
def test_what_is_computed_again_is_not_called_known(start, name):
    service = start()
    ask(service, chat("what is it?", [picture()]))
    assert ask(service, chat("what is it?", [picture()], **PRUNINGS[name]))[1] == 0
    assert ask(service, chat("what is it?", [picture()], retain=8))[1] > 16


def test_earlier_prompts_take_a_part_of_the_memory_alone(start):
    model = tiny_model()
    service = tiny_service(model, max_bytes=400_000)
    for number in range(12):
        ask(service, chat(f"question {number}", [picture()], retain=8))
    pool = service.worker._prefixes
    assert 0 < pool.bytes <= 100_000
    service.stop()


def test_earlier_prompts_give_way_where_a_vision_tower_lacks_memory(start):
    service = start()
    ask(service, chat("what is it?", [picture()]))
    assert len(service.worker._prefixes)

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    hook = service.model.model.model.vision_tower.register_forward_pre_hook(fail)
    events = queue.Queue()
    request = ChatRequest.model_validate(chat("what is it?", [picture("blue")]))
    service.worker.submit(service.prepare(request, events.put))
    assert outcome(events).code == "out_of_memory"
    hook.remove()
    assert ask(service, chat("what is it?", [picture()]))[1] == 0


@pytest.mark.parametrize("length", [1, 3])
def test_a_job_is_told_of_a_failure_after_its_last_token(start, length):
    service = start()

    def keep(prefix, pictures):
        raise torch.OutOfMemoryError("no memory")

    service.worker._prefixes.keep = keep
    events = queue.Queue()
    request = ChatRequest.model_validate(chat("hello", [picture()], max_completion_tokens=length))
    service.worker.submit(service.prepare(request, events.put))
    assert outcome(events).code == "out_of_memory"


def test_another_question_about_a_picture_does_not_look_at_it_again(start):
    service, looks = start(), []
    service.model.model.model.vision_tower.register_forward_pre_hook(lambda *_: looks.append(1))
    for question in ("what is it?", "and where?", "what is it?"):
        ids, _ = ask(service, chat(question, [picture()], retain=8, speculate="chain"))
        assert ids == expected(service, question, [picture()], max_new_tokens=12, retain=8)
        looks.pop()  # that of the single run
    assert len(looks) == 1
    assert value(service, "twigvlm_cached_prompt_tokens_total") > 32


@pytest.mark.parametrize("options", PRUNINGS.values(), ids=PRUNINGS)
@pytest.mark.parametrize("prefix_bytes", [0, Limits().prefix_bytes])
def test_several_answers_look_at_the_picture_once(start, options, prefix_bytes):
    service, looks = start(prefix_bytes=prefix_bytes), []
    service.model.model.model.vision_tower.register_forward_pre_hook(lambda *_: looks.append(1))
    body = chat("what is it?", [picture()], temperature=1.5, seed=7, **options)
    events = queue.Queue()
    service.worker.submit(service.prepare(ChatRequest.model_validate({**body, "n": 3}), events.put))
    answers = outcomes(events, 3)
    assert len(looks) == 1
    assert answers == [ask(start(), {**body, "seed": seed})[0] for seed in (7, 8, 9)]
    assert answers[0] != answers[1]


def test_other_pictures_are_looked_at(start):
    service = start()
    for colour in ("red", "blue", "red"):
        ids, cached = ask(service, chat("what is it?", [picture(colour)], retain=8))
        assert ids == expected(service, "what is it?", [picture(colour)], max_new_tokens=12, retain=8)
    assert cached > 16, "the first one is known"


def test_answers_that_share_a_prompt_do_not_mix(start):
    service = start()
    bodies = [chat(question, [picture()], retain=8) for question in ("what is it?", "where?", "who?", "what is it?")]
    all_events = []
    for body in bodies:
        events = queue.Queue()
        service.worker.submit(service.prepare(ChatRequest.model_validate(body), events.put))
        all_events.append(events)
    found = [outcome(events) for events in all_events]
    for body, ids in zip(bodies, found, strict=True):
        question = body["messages"][0]["content"][-1]["text"]
        assert ids == expected(service, question, [picture()], max_new_tokens=12, retain=8)


def test_usage_tells_what_was_known(client):
    body = chat("how many tokens are known?", [picture("purple")])
    first = client.chat.completions.create(**body).usage.prompt_tokens_details.cached_tokens
    usage = client.chat.completions.create(**body).usage
    assert first < usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens
    assert body["model"] == NAME


def test_two_requests_of_an_engine_do_not_share_a_prefix_cache(start):
    service = start()
    inputs = build_inputs(service.processor, [[user_turn("what?", [picture()])]], service.model.device, torch.float32)
    engine, memory = service.model.engine(), PrefixCache()
    engine.add(inputs, memory=memory, max_new_tokens=4, do_sample=False)
    with pytest.raises(TwigVLMError, match="memory: another request still uses"):
        engine.add(inputs, memory=memory, max_new_tokens=4, do_sample=False)
    first = [token for event in engine.stream() for token in event.tokens]
    engine.add(inputs, memory=memory, max_new_tokens=4, do_sample=False)
    assert [token for event in engine.stream() for token in event.tokens] == first
