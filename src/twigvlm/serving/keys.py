"""The API key that clients send."""

import hmac

from twigvlm.errors import TwigVLMError
from twigvlm.serving.errors import RequestError


def checked_key(key: str | None) -> str | None:
    """A key without the white space around it, which comes with files that end in a line break; None: no key is asked for.

    Raises:
        TwigVLMError: it is empty, which is no key that anyone could have meant, or beyond ASCII, which clients send in different
            ways.
    """
    if key is None:
        return None
    if not key.strip():
        raise TwigVLMError("api_key: is empty; give a key, or leave it and TWIGVLM_API_KEY unset to serve without one")
    if not key.isascii():
        raise TwigVLMError("api_key: has characters beyond ASCII, which not every client can send; choose another key")
    return key.strip()


def authorize(header: str, key: str | None) -> None:
    """Raise RequestError unless the header `Authorization` has the key.

    Args:
        header: as it came.
        key: None: none is asked for.
    """
    if key is None:
        return
    scheme, _, given = header.partition(" ")
    # Header values arrive as latin-1; the comparison takes the same time wherever the keys differ.
    same = hmac.compare_digest(given.strip().encode("latin-1", errors="replace"), key.encode())
    if scheme.lower() != "bearer" or not same:
        raise RequestError("the API key is missing or wrong; send it as a bearer token", 401, code="invalid_api_key")
