"""Nothing is fetched but from hosts that are allowed, at the public address that was checked."""

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from twigvlm.serving.errors import RequestError
from twigvlm.serving.fetch import Fetcher, is_public

LOCAL = "127.0.0.1"


SENT = set()
"""Paths of files that were sent as a whole."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/secret")
            self.end_headers()
            return
        if self.path[1:].isdigit():
            self.send_response(int(self.path[1:]))
            self.end_headers()
            return
        self.send_response(200)
        if self.path == "/cut":
            self.send_header("Content-Length", "9")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100 if self.path == "/slow" else 0):
                self.wfile.write(b"x")
                time.sleep(0.05)
            self.wfile.write(b"x" * (5000 if self.path == "/large" else 5))
            SENT.add(self.path)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def https(tmp_path_factory):
    """A server at this machine, and the context that trusts it."""
    folder = tmp_path_factory.mktemp("certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=pictures.test", "-addext", "subjectAltName=DNS:pictures.test"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    server = HTTPServer((LOCAL, 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, ssl.create_default_context(cafile=str(certificate))
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetcher(https, monkeypatch):
    port, context = https
    asked = []

    def resolve(host, *_, **__):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (LOCAL, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    made = Fetcher(["pictures.test"], 1000, 5, allowed=lambda address: address == LOCAL, context=context, port=port)
    made.asked = asked
    return made


def test_an_allowed_host_is_fetched_from(fetcher):
    assert fetcher.fetch("https://pictures.test/a.png") == b"xxxxx"
    # The connection goes to the address that was checked, without asking for the name again.
    assert fetcher.asked[0] == "pictures.test"
    assert set(fetcher.asked[1:]) <= {LOCAL}


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/moved", 400, "302"),
        ("/large", 400, "more than 1,000 bytes"),
        ("/404", 400, "answers with status 404"),
        # what may be over by the next try
        ("/429", 502, "answers with status 429"),
        ("/503", 502, "answers with status 503"),
        ("/cut", 502, "does not deliver it"),
    ],
)
def test_the_status_tells_whether_the_request_is_at_fault_or_the_host(fetcher, path, status, words):
    with pytest.raises(RequestError, match=words) as refused:
        fetcher.fetch(f"https://pictures.test{path}")
    assert refused.value.status == status


@pytest.mark.parametrize("error", [socket.gaierror("no answer"), ConnectionRefusedError("refused")])
def test_a_host_that_cannot_be_reached_is_at_fault(fetcher, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(RequestError, match="does not deliver it") as refused:
        fetcher.fetch("https://pictures.test/a.png")
    assert refused.value.status == 502


def test_a_host_that_sends_a_byte_now_and_then_is_given_up(fetcher):
    fetcher.seconds = 0.4
    with pytest.raises(RequestError, match=r"takes longer than 0\.4 seconds|does not deliver") as refused:
        fetcher.fetch("https://pictures.test/slow")
    assert refused.value.status == 504
    assert "/slow" not in SENT


def test_nothing_is_connected_to_when_no_time_is_left(fetcher):
    with pytest.raises(RequestError, match=r"pictures\.test does not deliver it \(no time is left\)") as refused:
        fetcher.fetch("https://pictures.test/a.png", time.monotonic() - 1)
    assert refused.value.status == 504


def test_a_name_that_leads_to_a_private_address_is_refused(fetcher):
    strict = Fetcher(["pictures.test"], 1000, port=fetcher.port)
    with pytest.raises(RequestError, match="not a public address") as refused:
        strict.fetch("https://pictures.test/a.png")
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.test/a.png",
        "https://other.test/a.png",
        "https://pictures.test.evil.test/a.png",
        "https://pictures.test@evil.test/a.png",
        "https://evil.test#@pictures.test/",
        "https://pictures.test:22/a.png",
        "https://pictures.test:x/",
        "https://[::1]/",
        "https://[/",
        "file:///etc/passwd",
        "ftp://pictures.test/a.png",
        "//pictures.test/a.png",
        "/etc/passwd",
        "",
        "https://pictures.test/a\r\nHost: evil",
        "https://pictures.test/a b",
        "https://pictures.test/é",
        "gopher://pictures.test/",
    ],
)
def test_all_other_addresses_are_refused_without_asking_anyone(fetcher, url):
    with pytest.raises(RequestError) as refused:
        fetcher.fetch(url)
    assert refused.value.status == 400
    assert fetcher.asked == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2a00:1450:4001::200e", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::808:808", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378::", False),
        ("2001:db8::1", False),
        ("::7f00:1", False),
        ("::ffff:0:127.0.0.1", False),
        ("fec0::1", False),
        ("5f00::1", False),
        ("ff02::1", False),
        ("fe80::1%eth0", False),
    ],
)
def test_what_counts_as_public(address, public):
    assert is_public(address) == public
