"""Host names by which clients may call a server, so that foreign web pages cannot reach it by DNS rebinding."""

import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from twigvlm.errors import TwigVLMError
from twigvlm.serving.errors import RequestError
from twigvlm.serving.keys import is_local

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Names and addresses that only lead from this machine to itself."""

_LABELS = r"[a-z0-9_-]+(\.[a-z0-9_-]+)*"
_PATTERN = re.compile(rf"\*|(\*\.)?{_LABELS}|\[[0-9a-f:.]+\]")
"""`*`, a name, `*.` and a name, or an IPv6 address in brackets."""


def allowed_hosts(host: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that a request's Host header may have; none: any name.

    Even a server that listens only on this machine can be reached by web pages that its user visits, if their name is made to
    resolve to this machine (DNS rebinding). The Host header of such a request has the page's name.

    Args:
        host: address that the server listens on.
        names: names that its owner allows in addition to those of this machine.

    Raises:
        TwigVLMError: one of the names is not a valid host name.
    """
    for name in names:
        if _PATTERN.fullmatch(name.lower()) is None:
            raise TwigVLMError(
                f"allow_host {name!r}: is no host name; give one without a port, such as example.com, "
                "or *.example.com for all names that end with it"
            )
    local = is_local(host)
    return (*LOCAL, "[::1]", *((host,) if local else ()), *names) if local or names else ()


class HostGuard:
    """Middleware that refuses requests whose Host header has a name that is not allowed.

    Args:
        app: the application that answers all other requests.
        hosts: allowed names, from `allowed_hosts`.
        refuse: makes the response for a path and an error.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], refuse: Callable[[str, RequestError], ASGIApp]) -> None:
        self._app, self._refuse = app, refuse
        self._hosts = [host.lower() for host in hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        app = self._app
        if scope["type"] == "http":
            name = _name(Headers(scope=scope).get("host", ""))
            if not any(_matches(name, host) for host in self._hosts):
                error = RequestError(
                    f"Host: {name!r} is not a name of this server; call it by another one, or start it with --allow-host"
                )
                app = self._refuse(scope["path"], error)
        await app(scope, receive, send)


def _name(header: str) -> str:
    """The name in a Host header, without its port."""
    header = header.strip().lower()
    return re.sub(r":[0-9]*$", "", header)


def _matches(name: str, host: str) -> bool:
    return host in ("*", name) or (host.startswith("*.") and name.endswith(host[1:]))
