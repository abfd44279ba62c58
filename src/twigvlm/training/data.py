"""Conversations in LLaVA's JSON format -> token ids with labels on the answers.

A sample is `{"id": …, "image": …, "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", …}, …]}`;
`image` is a path below the image folder or a PIL image.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from twigvlm.errors import TwigVLMError
from twigvlm.images import load_image

IGNORE = -100
"""Label of a token that is no part of an answer."""

_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@runtime_checkable
class Samples(Protocol):
    """A list, a Hugging Face `datasets.Dataset`, or anything else with a length and indices."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def load_samples(path: Path, images: Path | None = None) -> list[dict[str, Any]]:
    """Read conversations from a `.json` (a list) or `.jsonl` file, or from all of them in a directory; check each one.

    Args:
        path: file or directory.
        images: folder that image paths start from. None: the folder of the file that names them.

    Returns:
        The samples, with absolute image paths.

    Raises:
        TwigVLMError: names the file, and the sample by its id, with the remedy.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        if not files:
            raise TwigVLMError(f"data {str(path)!r}: holds no .json or .jsonl file; name the file of conversations")
    elif path.is_file():
        files = [path]
    else:
        raise TwigVLMError(
            f"data {str(path)!r}: no such file or directory; give a .json or .jsonl file of conversations"
        )
    if images is not None and not images.is_dir():
        raise TwigVLMError(f"images {str(images)!r}: no such directory; give the folder that image paths start from")
    samples = [_located(sample, index, images or file.parent) for file in files for index, sample in _records(file)]
    if not samples:
        raise TwigVLMError(f"data {str(path)!r}: holds no samples; give at least one conversation")
    return samples


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except (OSError, ValueError) as error:
        raise TwigVLMError(f"data {str(file)!r}: not readable as JSON ({error}); mend or export it again") from None
    if not isinstance(records, list):
        raise TwigVLMError(f"data {str(file)!r}: holds one JSON {type(records).__name__}; put the samples in a list")
    yield from enumerate(records)


def _located(sample: Any, index: int, folder: Path) -> dict[str, Any]:
    name = _name(sample, index)
    to_messages(sample, name)
    image = sample["image"]
    if not isinstance(image, str):
        raise TwigVLMError(f"{name}: image is {type(image).__name__}; give one path")
    file = folder / image
    if not file.is_file():
        raise TwigVLMError(
            f"{name}: no image file {str(file)!r}; set --images to the folder that image paths start from"
        )
    return {**sample, "image": str(file.resolve())}


def _name(sample: Any, index: int) -> str:
    identity = sample.get("id") if isinstance(sample, Mapping) else None
    return f"sample {index}" if identity is None else f"sample {identity!r}"


def to_messages(sample: Any, name: str) -> list[dict[str, Any]]:
    """The conversation as chat messages, its image in the first one.

    Raises:
        TwigVLMError: names the sample and what is wrong with it.
    """
    turns = sample.get("conversations") if isinstance(sample, Mapping) else None
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise TwigVLMError(f"{name}: has no list of turns under 'conversations'; see LLaVA's JSON format")
    messages = []
    for number, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        expected = "assistant" if number % 2 else "user"
        if not isinstance(speaker, str) or _ROLES.get(speaker) != expected:
            wanted = "'gpt'" if number % 2 else "'human'"
            raise TwigVLMError(f"{name}: turn {number} is from {speaker!r}, expected {wanted}; let both take turns")
        value = turn.get("value")
        if not isinstance(value, str) or not value.replace(_PLACEHOLDER, "").strip():
            raise TwigVLMError(f"{name}: turn {number} has no text under 'value'; fill it in or drop the turn")
        placeholders = value.count(_PLACEHOLDER)
        if placeholders != (number == 0):
            remedy = "put one into the first turn" if number == 0 else "only the first turn may hold one"
            raise TwigVLMError(f"{name}: turn {number} holds {placeholders} times {_PLACEHOLDER!r}; {remedy}")
        messages.append({"role": expected, "content": _content(value)})
    if len(messages) % 2:
        raise TwigVLMError(f"{name}: ends with a question; add its answer or drop it")
    if sample.get("image") is None:
        raise TwigVLMError(f"{name}: has no image; leave samples without one out")
    return messages


def _content(value: str) -> list[dict[str, str]]:
    before, found, after = value.partition(_PLACEHOLDER)
    parts = [("text", before), ("image", found), ("text", after)]
    return [
        {"type": kind, "text": text.strip()} if kind == "text" else {"type": kind}
        for kind, text in parts
        if text.strip()
    ]


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Samples as model inputs with labels: ids of the answers and of the token that ends each, `IGNORE` elsewhere.

    Args:
        samples: conversations; images as paths or PIL images.
        processor: the base's processor, with a chat template and a fast tokenizer.
        max_length: longer samples are cut at the end. None: no limit.
    """

    def __init__(self, samples: Samples, processor: Any, max_length: int | None = None) -> None:
        self.samples = samples
        self.processor = processor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        name = _name(sample, index)
        text, spans = render(to_messages(sample, name), self.processor)
        inputs = dict(self.processor(images=self._image(sample, name), text=text, return_tensors="pt"))
        ids = inputs["input_ids"][0]
        labels = align(text, spans, ids, self.processor, name)
        limit = self.max_length or len(ids)
        if (labels[:limit] == IGNORE).all():
            raise TwigVLMError(f"{name}: no answer within the first {limit} tokens; shorten it or raise max_length")
        cut = {key: value[:, :limit] if is_per_token(value, len(ids)) else value for key, value in inputs.items()}
        return {**cut, "labels": labels[None, :limit]}

    def _image(self, sample: Mapping[str, Any], name: str) -> Image.Image:
        image = sample["image"]
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        try:
            return load_image(image)
        except TwigVLMError as error:
            raise TwigVLMError(f"{name}: {error}") from None


def render(messages: list[dict[str, Any]], processor: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it each answer begins and ends, its end token included."""
    tokenizer = processor.tokenizer
    spans = []
    text = ""
    for end in range(2, len(messages) + 1, 2):
        question = processor.apply_chat_template(messages[: end - 1], add_generation_prompt=True)
        answered = processor.apply_chat_template(messages[:end]).rstrip()
        if not (question.startswith(text) and answered.startswith(question)):
            raise TwigVLMError(
                "chat template: rewrites earlier turns when one is added; training needs one that only appends"
            )
        spans.append((len(question), len(answered)))
        text = answered
    if not text.endswith(tuple(tokenizer.all_special_tokens)):  # templates that leave the end token to the trainer
        text += tokenizer.eos_token
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def align(text: str, spans: list[tuple[int, int]], ids: Tensor, processor: Any, name: str) -> Tensor:
    """Labels of the processor's ids, by the character spans of the answers.

    The processor expands the image's placeholder, so its ids are the plain text's only from the image on; the answers
    come after it, and both are compared from the end.
    """
    encoded = processor.tokenizer(text, return_offsets_mapping=True)
    plain = torch.tensor(encoded["input_ids"])
    labels = torch.full_like(ids, IGNORE)
    for back, (start, stop) in enumerate(reversed(encoded["offset_mapping"]), start=1):
        if stop <= spans[0][0] and stop > start:
            break
        if back > len(ids) or ids[-back] != plain[-back]:
            raise TwigVLMError(
                f"{name}: the processor tokenizes the answers otherwise than its tokenizer; drop the sample"
            )
        if any(start < last and stop > first for first, last in spans):
            labels[-back] = plain[-back]
    return labels


def is_per_token(value: Any, length: int) -> bool:
    """Whether a processor's output has one entry per token (ids, masks, token types)."""
    return isinstance(value, Tensor) and value.shape[:2] == (1, length)


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right to the longest of the batch, and joins their images."""

    pad_token_id: int
    """Id of padding; any valid id, since padding is masked."""

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One batch: `input_ids`, `attention_mask`, `labels`, and the processor's other tensors."""
        lengths = [sample["input_ids"].shape[1] for sample in samples]
        longest = max(lengths)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE}
        batch = {}
        for key in samples[0]:
            rows = [sample[key] for sample in samples]
            if all(is_per_token(row, length) for row, length in zip(rows, lengths, strict=True)):
                pad = torch.nn.functional.pad
                rows = [pad(row, (0, longest - row.shape[1]), value=fill.get(key, 0)) for row in rows]
            batch[key] = torch.cat(rows)
        return batch


def frequent_answer_tokens(samples: Samples, processor: Any, size: int) -> Tensor:
    """The `size` most frequent tokens of the answers, ascending: a small vocabulary for the twig to draft from.

    Where the answers have fewer, the lowest other ids fill it up. No image is read.
    """
    tokenizer = processor.tokenizer
    if size > len(tokenizer):
        raise TwigVLMError(f"draft_vocabulary={size}: at most {len(tokenizer)}, the tokens of this base")
    counts: Counter[int] = Counter()
    for index in range(len(samples)):
        sample = samples[index]
        text, spans = render(to_messages(sample, _name(sample, index)), processor)
        encoded = tokenizer(text, return_offsets_mapping=True)
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if any(start < last and stop > first for first, last in spans):
                counts[token] += 1
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    rest = (token for token in range(len(tokenizer)) if token not in counts)
    return torch.tensor(sorted((ranked + list(islice(rest, max(0, size - len(ranked)))))[:size]))
