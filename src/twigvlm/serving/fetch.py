"""Fetch images from hosts that the server's owner allowed by name, and from nowhere else."""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from math import inf
from threading import Timer
from urllib.parse import urlsplit

from twigvlm.errors import one_line
from twigvlm.serving.errors import RequestError

_CHUNK = 1 << 16
_PUBLIC = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2002::/16")))
"""Parts of `_PUBLIC` with special purposes: protocols such as Teredo, and 6to4."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not this machine, its network or a reserved range.

    For IPv6 this is the range that has been assigned as public. Addresses outside it include IPv4 addresses in another form
    (NAT64, 6to4), which may lead into this machine's network.
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:  # ::ffff:127.0.0.1 is 127.0.0.1
            return found in _PUBLIC and found.is_global and not any(found in part for part in _NOT_PUBLIC)
        found = found.ipv4_mapped
    return found.is_global and not found.is_multicast


class Fetcher:
    """Fetches images by https from allowed hosts.

    Redirects are refused. The name is resolved once, every address of it must be public, and the connection goes to the
    address that was checked, so that a name which changes its answer (DNS rebinding) leads nowhere else.

    Args:
        hosts: allowed host names, without wildcards; none: nothing is fetched.
        max_bytes: largest size of a file, in bytes.
        seconds: longest time for one file.
        allowed: whether an IP address may be connected to.
        context: TLS context; None: the machine's certificates.
        port: port of all hosts.
    """

    def __init__(
        self,
        hosts: Collection[str],
        max_bytes: int,
        seconds: float = 10.0,
        allowed: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
        port: int = 443,
    ) -> None:
        self.hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self.max_bytes, self.seconds, self.allowed, self.port = max_bytes, seconds, allowed, port
        self._context = context

    def fetch(self, url: str, until: float = inf) -> bytes:
        """Fetch the file at an address.

        Args:
            url: the address.
            until: when to give up at the latest, in seconds of `time.monotonic`.

        Raises:
            RequestError: the address is not allowed, or its host does not deliver an image of allowed size in time. The status
                is 502 or 504 where the host is at fault, so that another try may succeed.
        """
        host, target = self._split(url)
        deadline = min(until, time.monotonic() + self.seconds)
        try:
            return self._get(host, self._address(host), target, deadline)
        except (OSError, http.client.HTTPException) as error:
            late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
            status = 504 if late else 502
            raise RequestError(f"image_url: {host} does not deliver it ({one_line(error)})", status) from None

    def _split(self, url: str) -> tuple[str, str]:
        """The host, and the path and query to request from it."""
        refusal = RequestError(
            "image_url: must be a data URI (data:image/png;base64,…)"
            + (f", or an https address on {', '.join(sorted(self.hosts))}" if self.hosts else "; nothing is fetched")
        )
        try:
            parts = urlsplit(url)
            plain = parts.scheme == "https" and parts.port in (None, self.port) and "@" not in parts.netloc
            host = (parts.hostname or "").rstrip(".")
        except ValueError:
            raise refusal from None
        if not plain or host not in self.hosts:
            raise refusal
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or not target.isprintable() or " " in target:
            raise RequestError("image_url: write characters beyond ASCII and spaces as %XX")
        return host, target

    def _address(self, host: str) -> str:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM)]
        if not found or not all(self.allowed(address) for address in found):
            raise RequestError(f"image_url: {host} is not a public address; send the image as a data URI")
        return found[0]

    def _get(self, host: str, address: str, target: str, deadline: float) -> bytes:
        context = self._context or ssl.create_default_context()
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left")
        plain = socket.create_connection((address, self.port), timeout=left)
        with plain, _ended_after(plain, deadline - time.monotonic()):
            connection = http.client.HTTPSConnection(host, self.port)
            connection.sock = context.wrap_socket(plain, server_hostname=host)
            try:
                connection.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
                with connection.getresponse() as response:
                    return self._read(host, response, deadline)
            finally:
                connection.close()

    def _read(self, host: str, response: http.client.HTTPResponse, deadline: float) -> bytes:
        if response.status != 200:
            passing = response.status >= 500 or response.status in (408, 429)
            raise RequestError(f"image_url: {host} answers with status {response.status}", 502 if passing else 400)
        data = bytearray()
        while chunk := response.read1(_CHUNK):
            data += chunk
            if len(data) > self.max_bytes:
                raise RequestError(f"image_url: the image has more than {self.max_bytes:,} bytes")
        if time.monotonic() > deadline:
            raise RequestError(f"image_url: {host} takes longer than {self.seconds:g} seconds", 504)
        if response.length:
            raise http.client.IncompleteRead(bytes(data), response.length)
        return bytes(data)


@contextmanager
def _ended_after(connection: socket.socket, seconds: float) -> Iterator[None]:
    """Close a connection after some seconds: the socket's own timeout starts again with every byte that arrives."""
    copy = connection.dup()

    def end() -> None:
        with suppress(OSError):
            copy.shutdown(socket.SHUT_RDWR)

    timer = Timer(max(0.0, seconds), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        copy.close()
