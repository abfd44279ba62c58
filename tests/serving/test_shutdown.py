"""A server that ends tells everyone so, in time, whatever it is doing."""

import contextlib
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.servers import chat, tiny_service, wait_until
from tests.serving.test_hostile import post
from tests.serving.test_worker import outcome, submit
from twigvlm.serving import server as module
from twigvlm.serving import worker
from twigvlm.serving.app import create_app
from twigvlm.serving.limits import Limits
from twigvlm.serving.server import make_server


@pytest.fixture
def busy(monkeypatch):
    """A service whose engine is in a step that does not end before the test does, and whether it has begun."""
    monkeypatch.setattr(worker, "_LAST_STEP", 0.05)
    service, begun, released = tiny_service(limits=Limits(max_rows=1)), threading.Event(), threading.Event()
    make = service.model.engine

    def engine(**options):
        made = make(**options)
        step = made.step
        made.step = lambda: (begun.set(), released.wait(60), step())[2]
        return made

    service.model.engine = engine
    yield service, begun
    released.set()
    service.stop()


@contextlib.contextmanager
def ending(service, seconds):
    """A server, and what sends it SIGTERM."""
    server = make_server(create_app(service), service, "127.0.0.1", 0, seconds)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield server.address, lambda: server.handle_exit(signal.SIGTERM, None)
    thread.join(10)
    assert not thread.is_alive()


def test_what_waits_is_refused_while_a_step_runs(busy):
    service, begun = busy
    running, waiting = (submit(service)[1] for _ in range(2))
    assert begun.wait(10)
    service.worker.drain()
    assert outcome(waiting).code == "shutting_down"
    assert running.empty()


def test_what_runs_is_told_at_the_end_of_its_time_while_a_step_runs(busy):
    service, begun = busy
    running = submit(service)[1]
    assert begun.wait(10)
    service.stop(0.1)
    error = outcome(running)
    assert (error.status, error.code) == (503, "shutting_down")
    assert service.worker.alive  # it ends with its step


def test_a_job_that_is_taken_up_meanwhile_is_told(monkeypatch):
    """It waits no longer, and has no rows yet."""
    monkeypatch.setattr(worker, "_LAST_STEP", 0.05)
    service, begun, released = tiny_service(), threading.Event(), threading.Event()
    make = service.model.engine
    monkeypatch.setattr(service.model, "engine", lambda **options: (begun.set(), released.wait(60), make(**options))[2])
    taken_up = submit(service)[1]
    try:
        assert begun.wait(10)
        service.stop()
        assert outcome(taken_up).code == "shutting_down"
        assert service.worker.alive
    finally:
        released.set()
    wait_until(lambda: not service.worker.alive)
    assert taken_up.empty()


def test_a_server_ends_although_a_step_does_not(busy):
    service, begun = busy
    with ThreadPoolExecutor(2) as pool, ending(service, 0.1) as (address, end):
        answers = [pool.submit(post, address, chat()) for _ in range(2)]
        assert begun.wait(10)
        wait_until(lambda: service._inside == 2)
        end()
        for answer in answers:
            status, body = answer.result()
            assert (status, body["error"]["code"]) == (503, "shutting_down")


def test_headers_are_limited_whatever_parsers_are_installed(busy):
    service, _ = busy
    assert make_server(create_app(service), service, "127.0.0.1", 0, 1).config.http == "h11"


def test_what_uvicorn_cancels_gets_an_answer_in_json(monkeypatch):
    monkeypatch.setattr(module, "_PARTING", 0.2)
    service, begun, released = tiny_service(), threading.Event(), threading.Event()
    prepare = service.prepare
    monkeypatch.setattr(service, "prepare", lambda *arguments: (begun.set(), released.wait(60), prepare(*arguments))[2])
    with ThreadPoolExecutor(1) as pool, ending(service, 0.1) as (address, end):
        answer = pool.submit(post, address, chat())
        assert begun.wait(10)
        end()
        try:
            status, body = answer.result()
            assert (status, body["error"]["code"]) == (503, "shutting_down")
        finally:
            released.set()
