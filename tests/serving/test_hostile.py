"""Whatever is sent, the answer is no 5xx, and the server goes on. `recipes/serving_bench.py` sends many more."""

import http.client
import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.serving import hostile
from tests.serving.servers import NAME, chat, picture, served, slow_down, tiled_service, tiny_service, wait_until
from twigvlm.config import PruningConfig
from twigvlm.serving.app import create_app
from twigvlm.serving.limits import Limits
from twigvlm.serving.page import page_settings
from twigvlm.serving.server import make_server
from twigvlm.serving.service import Defaults

COUNT = 300


def connect(address):
    parts = urlsplit(address)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)


def post(address, body, **headers):
    connection = connect(address)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json", **headers}
    )
    response = connection.getresponse()
    status, data = response.status, response.read()
    connection.close()
    return status, json.loads(data) if data[:1] == b"{" else {}


def test_malformed_and_hostile_requests(address, service):
    statuses = {}
    connection = connect(address)
    for seed in range(COUNT):
        try:
            status = hostile.send(connection, seed)
        except (http.client.HTTPException, ConnectionError):  # it may hang up on what is no HTTP
            connection.close()
            continue
        statuses.setdefault(status, []).append(seed)
    connection.close()
    assert {status: seeds for status, seeds in statuses.items() if status != 200 and not 400 <= status < 500} == {}
    assert len(statuses.get(400, ())) > COUNT // 3
    assert len(statuses.get(200, ())) < COUNT // 5
    assert service.worker.alive
    assert post(address, chat())[0] == 200


@pytest.fixture(scope="module")
def small():
    """A server with narrow limits."""
    limits = Limits(
        max_rows=1, max_waiting=1, max_body=5000, max_pixels=400, max_images=1, upload_seconds=0.3, max_tokens=100
    )
    service = tiny_service(limits=limits)
    slow_down(service, 0.02)
    with served(service) as address:
        yield address, service


def test_limits_of_size(small):
    address, _ = small
    assert post(address, chat("x" * 6000))[0] == 413
    status, body = post(address, chat(images=[picture(size=(21, 20))]))
    assert (status, body["error"]["param"]) == (400, "messages.0")
    assert "more than the limit of 400" in body["error"]["message"]
    assert post(address, chat(images=[picture(size=(20, 20))], max_completion_tokens=1))[0] == 200
    assert post(address, chat(images=[picture(size=(2, 2))] * 2))[0] == 400


def test_a_body_without_end_or_length_is_cut_off(small):
    address, _ = small
    parts = urlsplit(address)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest, status in (
        (b"Content-Length: 100\r\n\r\n{", b"408"),
        (b"Transfer-Encoding: chunked\r\n\r\n" + b"800\r\n" + b" " * 2048 + b"\r\n", b"413"),
    ):
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as raw:
            raw.sendall(head + rest + (rest[rest.index(b"\r\n\r\n") + 4 :] * 3 if status == b"413" else b""))
            assert raw.recv(100).split()[1] == status


def test_overload_is_429_and_a_client_that_hangs_up_makes_room(small):
    address, service = small
    held = [connect(address) for _ in range(2)]
    for connection in held:
        body = json.dumps(chat(max_completion_tokens=90, stream=True))
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})

    def refused():
        status, body = post(address, chat(max_completion_tokens=1))
        return status == 429 and body["error"]["type"] == "rate_limit_error"

    wait_until(refused)
    held[0].getresponse().read(10)  # it has begun
    for connection in held:
        connection.close()
    wait_until(lambda: post(address, chat(max_completion_tokens=1))[0] == 200)
    assert 'status="499"' in service.metrics.text()


def test_a_client_that_hangs_up_on_a_whole_answer_makes_room():
    service, steps, begun, gone = tiny_service(), [], threading.Event(), threading.Event()

    def wait_for_the_fifth():
        steps.append(1)
        if len(steps) == 5:
            begun.set()
            gone.wait(60)

    slow_down(service, 0, wait_for_the_fifth)
    with served(service) as address:
        connection = connect(address)
        body = json.dumps(chat(max_completion_tokens=90))
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        try:
            assert begun.wait(20)
            connection.close()
            wait_until(lambda: 'status="499"' in service.metrics.text())
        finally:
            gone.set()
        wait_until(lambda: "twigvlm_rows 0" in service.metrics.text())
    assert len(steps) < 10  # of ninety


def test_a_request_without_hope_does_not_wait_for_what_prepares(monkeypatch):
    service, begun, released = tiny_service(), threading.Event(), threading.Event()
    monkeypatch.setattr(service, "prepare", lambda *_: (begun.set(), released.wait(60), 1 / 0))
    with served(service) as address, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, address, chat())
        try:
            assert begun.wait(20)
            assert post(address, chat("x" * 9000))[1]["error"]["code"] == "context_length_exceeded"
        finally:
            released.set()
        assert first.result()[0] == 500


@pytest.mark.parametrize("stage", ["fetch", "check_schema", "prepare"])
def test_a_request_waits_no_longer_than_it_may_for_what_is_before_the_worker(monkeypatch, stage):
    service, released = tiny_service(limits=Limits(waiting_seconds=0.2)), threading.Event()
    monkeypatch.setattr(service, stage, lambda *_: released.wait(60) and 1 / 0)
    body = chat(images=["https://slow.test/a"] * (stage == "fetch"), response_format={"type": "json_object"})
    with served(service) as address, ThreadPoolExecutor(2) as pool:
        try:
            for status, refused in pool.map(lambda _: post(address, body), range(2)):  # the second one is not begun
                assert (status, refused["error"]["code"]) == (429, "rate_limit_exceeded")
                assert "has waited for 0.2 seconds" in refused["error"]["message"]
            assert not released.is_set()
            assert service._inside == service.memory.held == 0
        finally:
            released.set()


def test_what_a_shutdown_cannot_wait_for_is_told_so():
    service = tiny_service()
    slow_down(service, 0.05)
    server = make_server(create_app(service), service, "127.0.0.1", 0, 0.3)
    serving = threading.Thread(target=server.run)
    serving.start()
    with ThreadPoolExecutor(1) as pool:
        wait_until(lambda: server.started)
        whole = pool.submit(post, server.address, chat(max_completion_tokens=90))
        wait_until(lambda: "twigvlm_rows 1" in service.metrics.text())
        server.handle_exit(signal.SIGTERM, None)
        status, body = whole.result()
        assert (status, body["error"]["type"]) == (503, "server_error")
    serving.join()


def test_foreign_pages_reach_nothing(address):
    assert post(address, chat(), Host="evil.test")[0] == 400
    assert post(address, chat(), **{"Content-Type": "text/plain"})[0] == 415
    connection = connect(address)
    connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://evil.test"})
    response = connection.getresponse()
    assert response.status == 405
    assert not [name for name, _ in response.getheaders() if name.lower().startswith("access-control")]
    connection.close()


@pytest.mark.parametrize("path", ["/", "/health", "/page.js"])
def test_head_is_answered(address, path):
    connection = connect(address)
    connection.request("HEAD", path)
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.close()


def test_health_metrics_and_the_page(address):
    found = {}
    for path in ("/health", "/metrics", "/", "/page.js", "/page/settings", "/examples/signs"):
        connection = connect(address)
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200, path
        found[path] = response.read()
        connection.close()
    assert json.loads(found["/health"]) == {"status": "ok"}
    assert b"# TYPE twigvlm_time_to_first_token_seconds histogram" in found["/metrics"]
    assert json.loads(found["/page/settings"])["model"] == NAME
    assert json.loads(found["/page/settings"])["pruning"] == {"diverse": True}
    assert b"<title>twigvlm</title>" in found["/"]


def test_the_page_prunes_as_the_server_was_told():
    pruning = PruningConfig(retain=8, final_wipe=4, final_share=0.0, diverse=True, refocus=0.5)
    service = tiny_service(defaults=Defaults(pruning))
    settings = page_settings(service, needs_key=False)
    assert settings["pruning"] == {"final_wipe": 4, "final_share": 0.0, "diverse": True}
    assert (settings["retain"]["default"], settings["refocus"]) == (8, 0.5)
    service.stop()


@pytest.mark.parametrize(
    ("pruning", "expected"),
    [
        (PruningConfig(), (False, None)),
        (PruningConfig(retain=8), (True, 8)),
        (PruningConfig(keep=4), (True, 8)),  # 16 tokens in 2 layers of 6, and 4 in the others
        (PruningConfig(keep=40), (True, 16)),
    ],
)
def test_the_page_prunes_by_default_where_the_server_does(pruning, expected):
    service = tiny_service(defaults=Defaults(pruning))
    settings = page_settings(service, needs_key=False)
    assert (settings["prunes"], settings["retain"]["default"]) == expected
    service.stop()


def test_the_page_fits_its_budget_to_pictures_whose_tokens_depend_on_their_shape():
    """LLaVA-NeXT has more tokens than `image_seq_length`, which is that of one tile: no range holds for every picture."""
    service = tiled_service()
    settings = page_settings(service, needs_key=False)
    assert (settings["retain"]["low"], settings["retain"]["high"]) == (32, 576)
    body = chat("hi", [picture(size=(60, 60))], max_completion_tokens=2) | {"details": True}
    with served(service) as address:
        status, refused = post(address, body | {"retain": 1})
        assert (status, refused["error"]["message"][:9]) == (400, "retain=1:")
        status, answer = post(address, body | {"retain": 1, "fit_budget": True})
    details = answer["usage"]["prompt_tokens_details"]
    assert (status, details["kept_visual_tokens"]) == (200, 1)
    assert answer["choices"][0]["twigvlm"]["grid"] is None
    service.stop()


def test_an_engine_thread_that_has_ended_shows_in_health():
    service = tiny_service()
    with served(service) as address:
        service.worker.stop()
        connection = connect(address)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        connection.close()


def test_many_threads_at_once_leave_no_place_taken(small):
    address, service = small

    def one():
        post(address, chat(max_completion_tokens=2))

    threads = [threading.Thread(target=one) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert post(address, chat(max_completion_tokens=1))[0] == 200
    assert service._inside == 0
