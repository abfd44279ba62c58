"""What requests hold is counted, bounded, and let go of."""

import contextlib
import gc
import json
import queue
import socket
import threading
import weakref
from urllib.parse import urlsplit

import pytest

from tests.serving.servers import chat, picture, served, slow_down, tiny_service, wait_until
from tests.serving.test_hostile import connect, post
from twigvlm.serving import app
from twigvlm.serving.limits import Limits
from twigvlm.serving.protocol import ChatRequest, parse_request


def test_requests_together_hold_bounded_memory():
    service = tiny_service(limits=Limits(max_held=30_000))
    slow_down(service, 0.02)
    large = {"user": "x" * 20_000}
    with served(service) as address, contextlib.closing(connect(address)) as held:
        body = json.dumps(chat(max_completion_tokens=90, stream=True, **large))
        held.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        with held.getresponse() as response:
            assert response.status == 200
            status, refused = post(address, chat(**large))
            assert (status, refused["error"]["code"]) == (429, "rate_limit_exceeded")
        held.close()
        wait_until(lambda: post(address, chat(max_completion_tokens=1, **large))[0] == 200)
    assert service.memory.held == 0


def test_a_single_request_may_exceed_what_all_may_hold():
    service = tiny_service(limits=Limits(max_held=1_000))
    with served(service) as address:
        assert post(address, chat(images=[picture()], max_completion_tokens=1, user="x" * 2_000))[0] == 200
    assert service.memory.held == 0


def test_a_request_that_has_ended_holds_nothing():
    service, jobs = tiny_service(), []
    prepare = service.prepare

    def remember(*arguments):
        job = prepare(*arguments)
        jobs.append(weakref.ref(job))
        return job

    service.prepare = remember
    gc.disable()  # it comes late, and what it would free are pictures
    try:
        with served(service) as address:
            for options in (
                {},
                {"stream": True},
                {"stream": True, "retain": 8, "refocus": 1.0, "speculate": "chain"},
                {"n": 2},
            ):
                assert post(address, chat(images=[picture()], **options))[0] == 200
            wait_until(lambda: all(job() is None for job in jobs))
        assert len(jobs) == 4
    finally:
        gc.enable()


def test_a_client_that_hangs_up_leaves_nothing_in_the_queue_of_what_prepares(monkeypatch):
    service, requests, begun, released = tiny_service(), [], threading.Event(), threading.Event()
    prepare = service.prepare
    monkeypatch.setattr(service, "prepare", lambda *arguments: (begun.set(), released.wait(60), prepare(*arguments))[2])

    def remember(body):
        request = parse_request(body)
        requests.append(weakref.ref(request))
        return request

    monkeypatch.setattr(app, "parse_request", remember)
    with served(service) as address:
        first = connect(address)
        first.request("POST", "/v1/chat/completions", json.dumps(chat()), {"Content-Type": "application/json"})
        try:
            assert begun.wait(20)
            waiting = [connect(address) for _ in range(4)]
            for connection in waiting:
                body = json.dumps(chat("x" * 5_000, max_completion_tokens=1))
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            # What is being prepared waits, too.
            wait_until(lambda: "twigvlm_requests_waiting 5\n" in service.metrics.text(), seconds=20)
            for connection in waiting:
                connection.close()
            wait_until(lambda: 'status="499"} 4\n' in service.metrics.text(), seconds=20)
            gc.collect()
            assert [request() is not None for request in requests] == [True] + 4 * [False]
            assert "twigvlm_requests_waiting 1\n" in service.metrics.text()
        finally:
            released.set()
        assert first.getresponse().status == 200
        first.close()


def test_bodies_that_are_on_their_way_are_counted():
    service = tiny_service(limits=Limits(max_held=30_000))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with served(service) as address:
        parts = urlsplit(address)
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as raw:
            raw.sendall(head + b"Content-Length: 100000\r\n\r\n" + b" " * 25_000)
            wait_until(lambda: service.memory.held >= 25_000)
            assert post(address, chat(user="x" * 20_000))[0] == 429
        wait_until(lambda: post(address, chat(max_completion_tokens=1, user="x" * 20_000))[0] == 200)
    assert service.memory.held == 0


@pytest.mark.parametrize("stream", [True, False])
def test_what_a_stream_has_told_is_not_kept(service, stream):
    request = ChatRequest.model_validate(chat(images=[picture()], details=True, retain=8, stream=stream))
    events = queue.Queue()
    job = service.prepare(request, events.put)
    completion = service.completion(request, job)
    service.worker.submit(job)
    while not completion.finished:
        completion.take(events.get(timeout=20))
    assert bool(completion.as_json()["choices"][0]["twigvlm"]["kept"]) is not stream
