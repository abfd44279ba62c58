"""Pictures of requests are read as they are elsewhere, within the server's limits."""

import base64
from io import BytesIO

import pytest
from PIL import Image

from tests.serving.servers import picture
from tests.test_images import LONG, chunk
from twigvlm.images import load_image
from twigvlm.serving.errors import RequestError
from twigvlm.serving.fetch import Fetcher
from twigvlm.serving.pictures import read_picture

NOWHERE = Fetcher((), 0)


def stored(size=(20, 12), form="PNG"):
    data = BytesIO()
    Image.new("RGB", size, "red").save(data, form)
    return data.getvalue()


def uri(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("text", [chunk(b"iCCP", b"profile\0\0" + LONG), chunk(b"zTXt", b"Comment\0\0" + LONG)])
def test_a_large_profile_or_text_does_not_matter(text):
    data = stored()
    at = data.index(b"IDAT") - 4
    found = read_picture(uri(data[:at] + text + data[at:]), 1000, NOWHERE)
    assert found.tobytes() == load_image(data).tobytes()


@pytest.mark.parametrize("pillow_s_limit", [None, 50])
def test_a_picture_that_is_too_large_is_to_be_scaled_down(monkeypatch, pillow_s_limit):
    """Pillow refuses far too large ones in a way of its own."""
    if pillow_s_limit:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_s_limit)
    with pytest.raises(RequestError, match=r"image_url: .* than the limit of 200 pixels; scale it down"):
        read_picture(picture(), 200, NOWHERE)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no picture", "not an image in one of the formats PNG, JPEG, WEBP, GIF, BMP; save it as"),
        (stored(form="TIFF"), "not an image in one of the formats"),
        (stored()[:50], "image_url: corrupt or truncated"),
    ],
)
def test_what_is_no_picture_is_refused(data, words):
    with pytest.raises(RequestError, match=words):
        read_picture(uri(data), 1000, NOWHERE)
