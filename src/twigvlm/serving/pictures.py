"""Images of requests: data URIs, or addresses that the server's owner allowed."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BytesIO
from math import inf
from time import monotonic

from PIL import Image

from twigvlm.errors import TwigVLMError
from twigvlm.images import WITHOUT_WARNINGS, from_data_uri, read_image
from twigvlm.serving.errors import RequestError
from twigvlm.serving.failures import request_error
from twigvlm.serving.fetch import Fetcher
from twigvlm.serving.limits import Limits
from twigvlm.serving.protocol import ChatRequest, ImagePart, TextPart

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What a server reads: other decoders of Pillow are seldom needed, and some start programs."""
MAX_EXIF = 64
"""Most segments of EXIF in a JPEG: for each, Pillow copies all earlier ones."""
MAX_ESCAPES = 100_000
"""Most percent signs of a data URI: what is no escape takes Python long to find out."""


def is_fetched(part: TextPart | ImagePart) -> bool:
    """Whether a part of a message is an image that is not in the request."""
    return isinstance(part, ImagePart) and not _is_data(part.image_url.url)


def fetch_pictures(
    request: ChatRequest, fetcher: Fetcher, until: float, max_bytes: int, check: Callable[[], object] = lambda: None
) -> dict[str, bytes]:
    """The files that the images of a request lead to, by their addresses; each is fetched once.

    Args:
        request: what was asked.
        fetcher: fetches them, one after the other.
        until: by the monotonic clock, for all of them together.
        max_bytes: of all of them together.
        check: called before each; raises where nobody waits for it any more.

    Raises:
        RequestError: one cannot be had, or not in time, or they are too large.
    """
    found: dict[str, bytes] = {}
    for number, message in enumerate(request.messages):
        for part in filter(is_fetched, message.parts):
            assert isinstance(part, ImagePart), "others are not fetched"
            url, name = part.image_url.url, f"messages.{number}"
            check()
            try:
                found[url] = found[url] if url in found else fetcher.fetch(url, until)
            except RequestError as error:
                if monotonic() > until:
                    raise RequestError(
                        f"{name}: image_url: the images take too long to fetch; send them as data URIs",
                        504, param=name, code="timeout",
                    ) from None  # fmt: skip
                raise RequestError(f"{name}: {error}", error.status, param=name) from None
            if sum(map(len, found.values())) > max_bytes:
                raise RequestError(
                    f"messages: the images have more than {max_bytes:,} bytes together; send fewer or smaller ones",
                    param="messages",
                )
    return found


def check_pixels(request: ChatRequest, limits: Limits, fetched: Mapping[str, bytes]) -> None:
    """Refuse a request whose images have too many pixels together, before any of them is decoded.

    Args:
        request: what was asked.
        limits: of requests.
        fetched: of `fetch_pictures`.

    Raises:
        RequestError: they have too many.
    """
    parts = [part for message in request.messages for part in message.parts if isinstance(part, ImagePart)]
    total = sum(min(_pixels(part.image_url.url, fetched), limits.max_pixels) for part in parts)
    if total > limits.max_request_pixels:
        raise RequestError(
            f"messages: the images have {total:,} pixels together, of at most {limits.max_request_pixels:,}; scale them down",
            param="messages",
        )


def _pixels(url: str, fetched: Mapping[str, bytes]) -> float:
    """Width times height by the header; infinite where it does not say, which `read_picture` may know better."""
    # Decoders raise whatever a broken file leads them to.
    with WITHOUT_WARNINGS, suppress(Exception), Image.open(BytesIO(_file(url, fetched)), formats=FORMATS) as image:
        return image.width * image.height
    return inf


def read_picture(url: str, max_pixels: int, fetched: Mapping[str, bytes]) -> Image.Image:
    """The image of an `image_url` as upright 8-bit RGB.

    Args:
        url: a data URI, or an address. Never a path.
        max_pixels: largest width times height; checked before a pixel is decoded.
        fetched: of `fetch_pictures`.

    Raises:
        RequestError: one line that says what is wrong with it.
    """
    try:
        return read_image("image_url", _file(url, fetched), FORMATS, max_pixels)
    except TwigVLMError as error:
        raise request_error(error) from None


def _file(url: str, fetched: Mapping[str, bytes]) -> bytes:
    """What an address leads to. Raises TwigVLMError where reading it would take too long."""
    if _is_data(url) and url.count("%") > MAX_ESCAPES:
        raise TwigVLMError(f"image_url: has more than {MAX_ESCAPES:,} percent signs; encode it in base64")
    data = from_data_uri("image_url", url) if _is_data(url) else fetched[url]
    if data.startswith(b"\xff\xd8") and data.count(b"Exif\0\0") > MAX_EXIF:
        raise TwigVLMError(f"image_url: has more than {MAX_EXIF} segments of EXIF; save it again")
    return data


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"
