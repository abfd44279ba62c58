"""Turn chat messages with pictures into the base's inputs; shared by chat, commands, training and evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from PIL import Image

from twigvlm.errors import TwigVLMError, one_line
from twigvlm.images import MAX_PIXELS, Picture, is_remote, load_image

Message = Mapping[str, Any]
"""A message with `role` and `content`. The content is text, or a list of parts: `{"type": "text", "text": …}`,
`{"type": "image", "image": …}` with a picture for `load_image`, and `{"type": "video", "video": …}` with a video for the
processor."""


def user_turn(text: str, images: Picture | Sequence[Picture] = (), videos: Sequence[Any] = ()) -> dict[str, Any]:
    """A question as a message of the user: pictures and videos, followed by the text. Pictures are read at once.

    Args:
        text: the question.
        images: a picture or several, as `load_image` takes them.
        videos: videos, as the base's processor takes them.

    Raises:
        TwigVLMError: a picture cannot be read.
    """
    given = images if isinstance(images, list | tuple) else [cast(Picture, images)]
    parts = [
        *({"type": "image", "image": load_image(image)} for image in given),
        *({"type": "video", "video": video} for video in videos),
        {"type": "text", "text": text},
    ]
    return {"role": "user", "content": parts}


def build_inputs(
    processor: Any,
    conversations: Sequence[Sequence[Message]],
    device: torch.device,
    dtype: torch.dtype,
    **options: Any,
) -> dict[str, Any]:
    """The base's inputs for conversations that end with a question, as one batch that is padded on the left.

    Earlier answers may contain a placeholder of pictures, since the base wrote them. A space is inserted into it, so that it does
    not stand for a picture.

    Args:
        processor: the base's processor, with a chat template.
        conversations: the messages of each conversation.
        device: device of the inputs.
        dtype: data type of the pixels.
        options: options of the processor, for example `num_frames` of a video.

    Returns:
        The processor's outputs by name, among them `input_ids` and `attention_mask`, both [conversations, tokens].

    Raises:
        TwigVLMError: a picture cannot be read, a question contains a placeholder, or the template or processor rejects the
            input.
    """
    conversations = [[_harmless(processor, message) for message in messages] for messages in conversations]
    images = [[load_image(image) for image in media(messages, "image")] for messages in conversations]
    videos = [list(media(messages, "video")) for messages in conversations]
    texts = [render(processor, messages) for messages in conversations]
    return dict(encode(processor, texts, images, videos, **options).to(device, dtype))


def media(messages: Sequence[Message], kind: str) -> Iterator[Any]:
    """The pictures ("image") or videos ("video") of a conversation, in order.

    Raises:
        TwigVLMError: a part of this kind is empty, or a video is given by a remote address.
    """
    for part in _parts(messages):
        if part["type"] == kind:
            source = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
            if source is None:
                raise TwigVLMError(f"prompt: a part of type {kind!r} is empty; give the {kind} as {kind!r}")
            if kind == "video" and is_remote(source):
                raise TwigVLMError(f"video {str(source)!r}: is a remote address; download the file and give its path")
            yield source


def render(
    processor: Any, messages: Sequence[Message], name: str = "prompt", add_generation_prompt: bool = True
) -> str:
    """A conversation as text, by the processor's chat template, with one placeholder for each picture.

    Args:
        processor: the base's processor.
        messages: the conversation. Parts for pictures become placeholders; the pictures themselves are not read.
        name: beginning of error messages.
        add_generation_prompt: whether the text ends with the template's beginning of an answer.

    Raises:
        TwigVLMError: a text contains a placeholder, or the template rejects the messages or supports only text.
    """
    for kind in ("image", "video"):
        for placeholder in _placeholders(processor, kind):
            if any(placeholder in (part.get("text") or "") for part in _parts(messages)):
                raise TwigVLMError(
                    f"{name}: contains the {kind} placeholder {placeholder!r}, which is added automatically; leave it out"
                )
    if getattr(processor, "chat_template", None) is None:
        raise TwigVLMError(f"{name}: the processor has no chat template; choose an instruction-tuned model")
    try:
        text = str(processor.apply_chat_template(_bare(messages), add_generation_prompt=add_generation_prompt))
    except Exception as error:  # templates raise whatever a conversation they are not made for leads them to
        raise TwigVLMError(
            f"{name}: rejected by the chat template ({one_line(error)}); choose an instruction-tuned vision-language "
            "model, or change the messages"
        ) from error
    for kind in ("image", "video"):
        token = getattr(processor, f"{kind}_token", None)
        wanted = sum(part["type"] == kind for part in _parts(messages))
        if token is not None and text.count(token) != wanted:
            raise TwigVLMError(
                f"{name}: the chat template writes {text.count(token)} placeholders {token!r} for {wanted} "
                f"{kind}s; choose a vision-language model's template"
            )
    return text


def encode(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    videos: Sequence[Sequence[Any]] = (),
    name: str = "prompt",
    **options: Any,
) -> Any:
    """The processor's outputs for rendered conversations and their pictures; several are padded on the left.

    Args:
        processor: the base's processor.
        texts: results of `render`.
        images: pictures of each text, as `load_image` returns them.
        videos: videos of each text.
        name: beginning of error messages.
        options: options of the processor.

    Raises:
        TwigVLMError: the processor rejects the input, or would scale a picture to more than `MAX_PIXELS`.
    """
    pictures = [image for group in images for image in group]
    for image in pictures:
        _check_scaled(processor, image, name)
    options = {**options, **special_tokens(texts[0], processor.tokenizer)}
    if len(texts) > 1:
        options |= {"padding": True, "padding_side": "left"}
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token  # any will do: padding is masked
    if clips := [video for group in videos for video in group]:
        options["videos"] = clips
    try:
        return processor(
            images=(pictures if len(texts) == 1 else [list(group) for group in images]) if pictures else None,
            text=texts[0] if len(texts) == 1 else list(texts),
            return_tensors="pt",
            **options,
        )
    except Exception as error:  # processors raise whatever an odd picture leads them to
        sizes = ", ".join(sorted({f"{image.width}x{image.height}" for image in pictures}))
        remedy = f"; its images have {sizes} pixels, scale or crop them" if pictures else "; change the text"
        raise TwigVLMError(f"{name}: rejected by the processor ({one_line(error)}){remedy}") from error


def special_tokens(text: str, tokenizer: Any) -> dict[str, bool]:
    """The option `add_special_tokens` for tokenizing a rendered template, as `apply_chat_template(tokenize=True)` sets it.

    A template may begin with the BOS token; then the tokenizer must not add it a second time.
    """
    return {"add_special_tokens": tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)}


def _parts(messages: Sequence[Message]) -> Iterator[Message]:
    for message in messages:
        content = message["content"]
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def _bare(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with empty parts for pictures and videos, which a template must not print."""

    def bare(part: Message) -> dict[str, Any]:
        return dict(part) if part["type"] == "text" else {"type": part["type"]}

    return [
        {**message, "content": content if isinstance(content := message["content"], str) else list(map(bare, content))}
        for message in messages
    ]


def _harmless(processor: Any, message: Message) -> Message:
    """An answer with placeholders made harmless; other messages unchanged."""
    if message["role"] != "assistant":
        return message

    def broken(text: str) -> str:
        for name in _placeholders(processor, "image") | _placeholders(processor, "video"):
            text = text.replace(name, f"{name[0]} {name[1:]}")
        return text

    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": broken(content)}
    return {
        **message,
        "content": [{**part, "text": broken(part["text"])} if part.get("text") else part for part in content],
    }


def _placeholders(processor: Any, kind: str) -> set[str]:
    """The placeholders of an image or a video in a text: the one that the processor expands, and the one it expands to."""
    found = (getattr(holder, f"{kind}_token", None) for holder in (processor, processor.tokenizer))
    return {token for token in found if isinstance(token, str)}


def _check_scaled(processor: Any, image: Image.Image, name: str) -> None:
    """Refuse a picture that becomes too large: some processors scale its short side to a fixed length before cropping."""
    size = getattr(processor.image_processor, "size", None) or {}
    edge = size.get("shortest_edge")
    if edge is None or size.get("longest_edge") is not None:
        return
    short, long = sorted(image.size)
    pixels = edge * edge * long // short
    if pixels > MAX_PIXELS:
        raise TwigVLMError(
            f"{name}: its image of {image.width}x{image.height} pixels would be scaled to {pixels:,}, more than the limit "
            f"of {MAX_PIXELS:,}; crop it"
        )
