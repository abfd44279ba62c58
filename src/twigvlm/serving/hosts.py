"""Names by which clients may call a server, so that foreign web pages cannot reach it by DNS rebinding."""

import re
from collections.abc import Callable, Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from twigvlm.errors import TwigVLMError
from twigvlm.serving.errors import RequestError

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Names and addresses by which only this machine can reach itself."""

_LABELS = r"[a-z0-9_-]+(\.[a-z0-9_-]+)*"
_PATTERN = re.compile(rf"\*|(\*\.)?{_LABELS}|\[[0-9a-f:.]+\]")
"""Any name, a name or what ends with one, and an IPv6 address."""


def allowed_hosts(host: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that a request's Host header may have; none: any.

    A server that only this machine can reach is still reached by the pages that its user visits, if their name is made to lead
    here. Such a request has that name in its header.

    Args:
        host: that the server listens on.
        names: that its owner allows beside those of this machine.

    Raises:
        TwigVLMError: one of them can be no name.
    """
    for name in names:
        if _PATTERN.fullmatch(name.lower()) is None:
            raise TwigVLMError(
                f"allow_host {name!r}: is no host name; give one without a port, such as example.com, "
                "or *.example.com for all names that end with it"
            )
    local = is_local(host)
    return (*LOCAL, "[::1]", *((host,) if local else ()), *names) if local or names else ()


def is_local(host: str) -> bool:
    """Whether a server that listens on a host can be reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class HostGuard:
    """Middleware that refuses requests whose Host header has another name.

    Args:
        app: answers the others.
        hosts: of `allowed_hosts`.
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
