"""Convert the messages of a request to the form that chat templates take."""

from collections.abc import Mapping
from typing import Any

from twigvlm.serving.errors import RequestError
from twigvlm.serving.pictures import read_picture
from twigvlm.serving.protocol import ChatRequest, TextPart


def template_messages(request: ChatRequest, max_pixels: int, fetched: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Convert messages to the form that chat templates take, and read their images.

    Args:
        request: the request.
        max_pixels: largest width times height of an image.
        fetched: result of `fetch_pictures`.

    Raises:
        RequestError: a text or an image cannot be read.
    """
    messages = []
    for number, message in enumerate(request.messages):
        parts: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": _text(part.text, number)})
                continue
            try:
                image = read_picture(part.image_url.url, max_pixels, fetched)
            except RequestError as error:
                raise RequestError(f"messages.{number}: {error}", param=f"messages.{number}") from None
            parts.append({"type": "image", "image": image})
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": parts})
    return messages


def _text(text: str, number: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"messages.{number}: is no text in UTF-8", param=f"messages.{number}") from None
    return text
