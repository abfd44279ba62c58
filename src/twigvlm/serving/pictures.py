"""Images of requests: data URIs, or files from hosts that the server's owner allowed."""

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
"""Formats that a server reads. Pillow's other decoders are seldom needed, and some start programs."""
MAX_EXIF = 64
"""Largest number of EXIF segments in a JPEG: for each one, Pillow copies all earlier ones."""
MAX_SCANS = 100
"""Most scans of a progressive JPEG, which has about ten: each takes the decoder through the whole picture."""
MAX_ESCAPES = 100_000
"""Largest number of percent signs in a data URI: Python decodes those that are not escapes slowly."""


_RUN_LENGTHS = (b"\1\0\0\0", b"\2\0\0\0")
"""Compression of a BMP that Pillow decodes in Python, pixel run by pixel run."""


def is_fetched(part: TextPart | ImagePart) -> bool:
    """Whether a part of a message is an image that must be fetched, because it is not a data URI."""
    return isinstance(part, ImagePart) and not _is_data(part.image_url.url)


def fetch_pictures(
    request: ChatRequest, fetcher: Fetcher, until: float, max_bytes: int, check: Callable[[], object] = lambda: None
) -> dict[str, bytes]:
    """Fetch the images that a request names by address, each address once, one after the other.

    Args:
        request: the request.
        fetcher: fetches one file.
        until: when to give up, in seconds of `time.monotonic`; applies to all files together.
        max_bytes: largest size of all files together.
        check: called before each file; raises if the client no longer waits.

    Returns:
        The files by their addresses.

    Raises:
        RequestError: a file cannot be fetched in time, or the files are too large.
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
        request: the request.
        limits: limits of requests.
        fetched: result of `fetch_pictures`.

    Raises:
        RequestError: the images have too many pixels.
    """
    parts = [part for message in request.messages for part in message.parts if isinstance(part, ImagePart)]
    total = sum(min(_pixels(part.image_url.url, fetched), limits.max_pixels) for part in parts)
    if total > limits.max_request_pixels:
        raise RequestError(
            f"messages: the images have {total:,} pixels together, of at most {limits.max_request_pixels:,}; scale them down",
            param="messages",
        )


def _pixels(url: str, fetched: Mapping[str, bytes]) -> float:
    """Width times height according to the header; infinite if it cannot be read, which `read_picture` will report."""
    # Decoders raise whatever a broken file leads them to.
    with WITHOUT_WARNINGS, suppress(Exception), Image.open(BytesIO(_file(url, fetched)), formats=FORMATS) as image:
        return image.width * image.height
    return inf


def read_picture(url: str, max_pixels: int, fetched: Mapping[str, bytes]) -> Image.Image:
    """Read the image of an `image_url` as upright 8-bit RGB.

    Args:
        url: a data URI, or an address; never a path.
        max_pixels: largest width times height; checked before any pixel is decoded.
        fetched: result of `fetch_pictures`.

    Raises:
        RequestError: one line that says what is wrong with it.
    """
    try:
        return read_image("image_url", _file(url, fetched), FORMATS, max_pixels)
    except TwigVLMError as error:
        raise request_error(error) from None


def _file(url: str, fetched: Mapping[str, bytes]) -> bytes:
    """The bytes of an image. Raises TwigVLMError if decoding them would take too long."""
    if _is_data(url) and url.count("%") > MAX_ESCAPES:
        raise TwigVLMError(f"image_url: has more than {MAX_ESCAPES:,} percent signs; encode it in base64")
    data = from_data_uri("image_url", url) if _is_data(url) else fetched[url]
    if data.startswith(b"\xff\xd8") and data.count(b"Exif\0\0") > MAX_EXIF:
        raise TwigVLMError(f"image_url: has more than {MAX_EXIF} segments of EXIF; save it again")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise TwigVLMError(f"image_url: has more than {MAX_SCANS} scans; save it again")
    if data.startswith(b"BM") and data[30:34] in _RUN_LENGTHS:
        raise TwigVLMError("image_url: is a compressed BMP, which takes long to read; save it as PNG")
    return data


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"
