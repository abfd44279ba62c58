"""The API key that clients send."""

import hmac
from ipaddress import ip_address

from twigvlm.errors import TwigVLMError
from twigvlm.serving.errors import RequestError


def is_local(host: str) -> bool:
    """Whether a server that listens on a host can be reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def checked_key(key: str | None) -> str | None:
    """The key without white space around it, such as the line break at the end of a file; None: no key is needed.

    Raises:
        TwigVLMError: the key is empty, which is surely a mistake, or not ASCII, which clients encode in different ways.
    """
    if key is None:
        return None
    if not key.strip():
        raise TwigVLMError("api_key: is empty; give a key, or leave it and TWIGVLM_API_KEY unset to serve without one")
    if not key.isascii():
        raise TwigVLMError("api_key: has characters beyond ASCII, which not every client can send; choose another key")
    return key.strip()


def authorize(header: str, key: str | None) -> None:
    """Raise RequestError unless a request's `Authorization` header has the key.

    Args:
        header: value of the header.
        key: the key, from `checked_key`; None: no key is needed.
    """
    if key is None:
        return
    scheme, _, given = header.partition(" ")
    # Header values arrive as latin-1; the comparison takes the same time wherever the keys differ.
    same = hmac.compare_digest(given.strip().encode("latin-1", errors="replace"), key.encode())
    if scheme.lower() != "bearer" or not same:
        raise RequestError("the API key is missing or wrong; send it as a bearer token", 401, code="invalid_api_key")
