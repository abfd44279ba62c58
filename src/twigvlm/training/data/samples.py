"""Training samples as they come, each turned into one form.

Two kinds are understood, and may be mixed:

- LLaVA's: `{"id": …, "image": …, "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", …}, …]}`;
- chat messages: `{"messages": [{"role": "user", "content": …}, …], "images": […]}`, where content is text (with `<image>`
  where a picture belongs) or a list of parts `{"type": "text", "text": …}` and `{"type": "image", …}`.

A picture is a path, a data URI, a PIL image, or a file's bytes as Hugging Face's datasets keep them. `image` or `images`
holds one, several or none; a part may hold its own under `image`, `path` or `url`. The form that comes out is chat
messages of parts, and `images`.
"""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from twigvlm.errors import TwigVLMError, one_line
from twigvlm.images import is_remote, is_uri

PLACEHOLDER = "<image>"
"""Where a picture belongs in a text."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BrokenSample(TwigVLMError):
    """A sample that cannot be trained on; the message begins with its name."""


@runtime_checkable
class Samples(Protocol):
    """A list, a Hugging Face `datasets.Dataset`, or anything else with a length and indices."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def read_sample(samples: Samples, index: int) -> tuple[Any, Any]:
    """A sample, and its id; its index where it has none.

    Args:
        samples: the samples.
        index: of the sample, from 0.

    Raises:
        BrokenSample: it cannot be read, for example because it holds a corrupt picture that is decoded on the way.
    """
    try:
        sample = samples[index]
    except TwigVLMError:
        raise
    except Exception as error:  # whatever a reader or a decoder of pictures meets
        raise BrokenSample(f"sample {index}: cannot be read ({one_line(error)}); correct or drop it") from None
    identity = sample.get("id") if isinstance(sample, Mapping) else None
    return sample, index if identity is None else identity


def to_messages(sample: Any, identity: Any, folder: Path | None = None) -> dict[str, Any]:
    """The sample as `{"id", "messages", "images"}`: chat messages made of parts, and their pictures in order.

    A sample that has this form already stays as it is. Among the pictures beside the turns, None and "" stand for none.

    Args:
        sample: a sample of either kind.
        identity: its id.
        folder: that relative image paths start from.

    Raises:
        BrokenSample: names the sample and what is wrong with it.
    """
    name = f"sample {identity!r}"
    sample = sample if isinstance(sample, Mapping) else {}
    if any(sample.get(key) for key in ("video", "videos", "audio")):
        raise BrokenSample(f"{name}: holds video or audio; drop it, since only pictures are supported")
    messages = list(_turns(sample, name))
    beside = sample.get("images") or sample.get("image")
    # Tables have an empty name, or none, in the rows without a picture.
    given = iter([one for one in (beside if isinstance(beside, list | tuple) else [beside]) if not _is_empty(one)])
    images: list[Any] = []
    for number, message in enumerate(messages):
        for part in message["content"]:
            if part["type"] == "image":
                inline = part.pop("image")
                images.append(_image(next(given, None) if inline is None else inline, f"{name}: turn {number}", folder))
    if left := len(list(given)):
        raise BrokenSample(
            f"{name}: images without a place in the questions: {left}; put {PLACEHOLDER!r} there, or drop them"
        )
    return {"id": identity, "messages": messages, "images": images}


def _turns(sample: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Messages of parts, questions and answers in turn; an image's part holds the image, or None for the next beside."""
    chat = sample.get("messages") is not None
    turns = sample.get("messages" if chat else "conversations")
    who, what = ("role", "content") if chat else ("from", "value")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BrokenSample(f"{name}: has no list of turns under 'conversations' or 'messages'; see LLaVA's JSON format")
    expected = "user"
    for number, turn in enumerate(turns):
        said = turn.get(who) if isinstance(turn, Mapping) else None
        role = _ROLES.get(said) if isinstance(said, str) else None
        leads = number == 0 and role == "system"
        if role != expected and not leads:
            wanted = [speaker for speaker, spoken in _ROLES.items() if spoken == expected]
            raise BrokenSample(
                f"{name}: turn {number} is from {said!r}, expected {' or '.join(map(repr, wanted))}; let both take turns"
            )
        parts = list(_parts(turn.get(what), f"{name}: turn {number}"))
        kinds = {part["type"] for part in parts}
        if "text" not in kinds:
            raise BrokenSample(f"{name}: turn {number} has no text under {what!r}; fill it in or drop the turn")
        if "image" in kinds and role != "user":
            raise BrokenSample(f"{name}: turn {number} holds an image or {PLACEHOLDER!r}; move it into a question")
        yield {"role": role, "content": parts}
        if not leads:
            expected = "user" if expected == "assistant" else "assistant"
    if role != "assistant":
        raise BrokenSample(f"{name}: ends with a question; add its answer or drop it")


def _parts(content: Any, name: str) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        for number, text in enumerate(content.split(PLACEHOLDER)):
            if number:
                yield {"type": "image", "image": None}
            if text.strip():
                yield {"type": "text", "text": text.strip()}
        return
    for part in content if isinstance(content, Sequence) else ():
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            yield {
                "type": "image",
                "image": next((part[key] for key in ("image", "path", "url") if part.get(key)), None),
            }
        elif kind == "text" and isinstance(part.get("text"), str):
            if part["text"].strip():
                yield {"type": "text", "text": part["text"].strip()}
        else:
            raise BrokenSample(f"{name} holds a part of type {kind!r}; give it 'text' and 'image' alone")


def _is_empty(image: Any) -> bool:
    return image is None or (isinstance(image, str) and not image)


def _image(image: Any, name: str, folder: Path | None) -> str | bytes | Image.Image:
    if image is None:
        raise BrokenSample(f"{name} holds more places for images than there are images; add them or drop the places")
    if isinstance(image, Mapping):  # a picture that Hugging Face's datasets have not decoded
        image = image.get("bytes") or image.get("path")
    if is_remote(image):
        raise BrokenSample(f"{name} has the remote image {str(image)!r}; download it and give its path")
    if isinstance(image, str | PathLike):
        return str(image) if folder is None or is_uri(image) else str(folder / image)
    if isinstance(image, bytes | Image.Image):
        return image
    raise BrokenSample(f"{name} has an image that is {type(image).__name__}; give a path or a PIL image")
