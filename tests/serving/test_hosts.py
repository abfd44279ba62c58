"""Names by which a server may be called."""

import json

import pytest

from tests.serving.servers import served
from tests.serving.test_hostile import connect
from twigvlm.errors import TwigVLMError
from twigvlm.serving.hosts import allowed_hosts


def get(address, host, path="/v1/models"):
    connection = connect(address)
    connection.request("GET", path, headers={"Host": host})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("[::1]:8000", 200),
        ("Server.example", 200),
        ("a.b.example.com:1", 200),
        ("evil.test", 400),
        ("example.com", 400),
        ("badexample.com", 400),
        ("localhost.evil.test", 400),
        ("[::1].evil.test", 400),
        ("", 400),
    ],
)
def test_requests_with_another_name_are_refused(service, host, status):
    hosts = allowed_hosts("127.0.0.1", ("server.EXAMPLE", "*.example.com"))
    with served(service, hosts=hosts, stop_with_app=False) as address:
        assert get(address, host)[0] == status


def test_a_refusal_is_openai_s_error_with_a_remedy(address):
    for path in ("/v1/models", "/", "/nowhere"):
        status, body = get(address, "evil.test", path)
        error = json.loads(body)["error"]
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert "'evil.test' is not a name of this server" in error["message"]
        assert "--allow-host" in error["message"]


def test_any_name_is_answered_where_the_owner_says_so(service):
    with served(service, hosts=allowed_hosts("127.0.0.1", ("*",)), stop_with_app=False) as address:
        assert get(address, "evil.test")[0] == 200
    assert allowed_hosts("0.0.0.0", ()) == ()


@pytest.mark.parametrize("name", ["a*b", "*a", "a.*", "**", "", "a b", "http://a", "a:80", "a/b", "é.test", "a..b"])
def test_what_can_be_no_name_is_refused(name):
    with pytest.raises(TwigVLMError, match=r"is no host name; give one without a port, such as example\.com"):
        allowed_hosts("127.0.0.1", (name,))


@pytest.mark.parametrize("host", ["127.0.0.2", "LOCALHOST", "0:0:0:0:0:0:0:1", "::1"])
def test_every_name_of_this_machine_is_guarded(host):
    assert host in allowed_hosts(host, ())
    assert "evil.test" not in allowed_hosts(host, ())
