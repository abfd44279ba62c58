"""What a failed request costs: no second try where that would end in the same way, and one entry in each metric."""

import pytest
import torch
from openai import APIStatusError, OpenAI

from tests.serving.servers import chat, picture, served, slow_down, tiny_model, tiny_service, wait_until
from tests.serving.test_hostile import connect, post
from twigvlm.serving.errors import RequestError
from twigvlm.serving.limits import Limits
from twigvlm.serving.protocol import ChatRequest


def counted(service, status):
    """Chat requests with this status."""
    name = f'twigvlm_requests_total{{status="{status}"}} '
    return sum(int(line.removeprefix(name)) for line in service.metrics.text().splitlines() if line.startswith(name))


def timed(service):
    """Answers of which the time in total is known."""
    name = "twigvlm_request_seconds_count "
    (line,) = (line for line in service.metrics.text().splitlines() if line.startswith(name))
    return int(line.removeprefix(name))


@pytest.fixture
def late():
    """A service whose answers take longer than they may."""
    service = tiny_service(limits=Limits(total_seconds=0.4))
    slow_down(service, 0.03)
    yield service
    service.stop()


def test_a_client_does_not_ask_again_for_an_answer_that_takes_too_long(late):
    with served(late) as address, OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=2) as client:
        with pytest.raises(APIStatusError) as failed:
            client.chat.completions.create(**chat(max_completion_tokens=90))
        assert failed.value.status_code == 408
        assert counted(late, 408) == 1


def test_a_client_does_not_ask_again_for_what_has_not_enough_memory(monkeypatch):
    service = tiny_service()

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(service, "prepare", fail)
    with served(service) as address, OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=2) as client:
        with pytest.raises(APIStatusError) as failed:
            client.chat.completions.create(**chat())
        assert (failed.value.status_code, failed.value.code) == (503, "out_of_memory")
        assert counted(service, 503) == 1


def test_answers_that_fail_are_timed_whether_they_are_streamed_or_not(late):
    with served(late) as address:
        assert post(address, chat(max_completion_tokens=90))[0] == 408
        assert timed(late) == 1
        assert post(address, chat(max_completion_tokens=90, stream=True))[0] == 200
        wait_until(lambda: counted(late, 408) == 2)  # a stream is counted when it has been sent
        assert timed(late) == 2
        assert post(address, chat(n=99))[0] == 400  # no answer has begun
        assert timed(late) == 2


def test_all_chat_requests_are_counted_and_nothing_else():
    service = tiny_service()
    with served(service, api_key="secret") as address:
        assert post(address, chat())[0] == 401
        assert post(address, chat(), Host="evil.test")[0] == 400
        assert post(address, chat(n=99), Authorization="Bearer secret")[0] == 400
        assert post(address, chat(max_completion_tokens=1), Authorization="Bearer secret")[0] == 200
        for path, headers in (("/v1/models", {}), ("/nowhere", {}), ("/", {"Host": "evil.test"})):
            connection = connect(address)
            connection.request("GET", path, headers=headers)
            assert connection.getresponse().status >= 400
            connection.close()
    assert [counted(service, status) for status in (200, 400, 401, 404)] == [1, 2, 1, 0]


def test_too_little_memory_to_prepare_a_prompt_is_no_fault_of_the_request(service, monkeypatch):
    def fail(*arguments, **options):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(type(service.processor), "__call__", fail)
    with pytest.raises(RequestError) as refused:
        service.prepare(ChatRequest.model_validate(chat(images=[picture()])), print)
    assert (refused.value.status, refused.value.code) == (503, "out_of_memory")


def test_beams_of_a_checkpoint_s_config_are_passed_over():
    """They are no wish of the client, who could not change them."""
    model = tiny_model()
    model.generation_config.num_beams = 3
    with served(tiny_service(model)) as address:
        for options in ({}, {"temperature": 1}):
            assert post(address, chat() | options)[0] == 200
