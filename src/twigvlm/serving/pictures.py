"""Images of requests: data URIs, or addresses that the server's owner allowed."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from PIL import Image

from twigvlm.errors import TwigVLMError
from twigvlm.images import read_image
from twigvlm.serving.errors import RequestError
from twigvlm.serving.fetch import Fetcher

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What a server reads: other decoders of Pillow are seldom needed, and some start programs."""

_SPACE = re.compile(rb"\s+")


def read_picture(url: str, max_pixels: int, fetcher: Fetcher) -> Image.Image:
    """The image of an `image_url` as upright 8-bit RGB.

    Args:
        url: a data URI, or an address that `fetcher` allows. Never a path.
        max_pixels: largest width times height; checked before a pixel is decoded.
        fetcher: for addresses.

    Raises:
        RequestError: one line that says what is wrong with it.
    """
    data = _from_data_uri(url) if url[:5].lower() == "data:" else fetcher.fetch(url)
    try:
        return read_image("image_url", data, FORMATS, max_pixels)
    except TwigVLMError as error:
        raise RequestError(str(error)) from None


def _from_data_uri(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    try:
        if not comma:
            raise ValueError
        decoded = unquote_to_bytes(data)
        if not head.lower().endswith(";base64"):
            return decoded
        return base64.b64decode(_SPACE.sub(b"", decoded), validate=True)
    except (ValueError, binascii.Error):
        raise RequestError("image_url: not a valid data URI; encode the file as data:image/png;base64,…") from None
