"""From samples to token ids with labels on the answers, and to batches.

A sample that turns out to be broken only when its picture is opened or its text tokenized is replaced by the next good one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from twigvlm.errors import TwigVLMError
from twigvlm.images import load_image
from twigvlm.inputs import encode, special_tokens
from twigvlm.inputs import render as render_messages
from twigvlm.training.data.load import summarise, warn_skipped
from twigvlm.training.data.samples import BrokenSample, Samples, read_sample, to_messages
from twigvlm.training.distributed import processes

IGNORE = -100
"""Label of a token that is not part of an answer."""


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """Samples as model inputs with labels: ids of the answers, `IGNORE` elsewhere.

    An answer includes the token that ends it where the template writes one; the last answer always ends with one.

    A broken sample is always replaced by the next good one, so that the order of samples and their division among processes
    survive a resume.

    Args:
        samples: as `load_samples` returns them.
        processor: the base's processor, with a chat template and a fast tokenizer.
        max_length: longer samples are cut at the end. None: those that the base's context does not hold, once it trains.
        strict: make a broken sample an error.
    """

    def __init__(
        self,
        samples: Samples,
        processor: Any,
        max_length: int | None = None,
        strict: bool = False,
    ) -> None:
        self.samples = samples
        self.processor = processor
        self.max_length = max_length
        self.strict = strict
        self.context: int | None = None
        """Tokens that the base can take; set when a training begins."""
        # Shared, so that processes that read beside the training report a broken sample once in all epochs.
        self.broken = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str | None:
        """Changes with the samples that `load_samples` read; None of others."""
        return getattr(self.samples, "digest", None)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The inputs of a sample, or of the next good one, each [1, …].

        Raises:
            TwigVLMError: a broken sample under `strict`, or every sample is broken.
        """
        count = len(self)
        if not 0 <= index < count:
            raise IndexError(f"sample {index} of {count}")
        reason = "see the lines above"
        for step in range(count):
            other = (index + step) % count
            if self.broken[other]:
                continue
            try:
                return self._encode(*read_sample(self.samples, other))
            except BrokenSample as error:
                if self.strict:
                    raise
                warn_skipped(error, int(self.broken.sum()))
                self.broken[other] = True
                reason = str(error)
        raise TwigVLMError(f"all {count} samples are broken; {reason}")

    def summarise(self) -> None:
        """Report how many samples were found broken so far in any process. All processes must call it."""
        found = set().union(*processes.gather(set(self.broken.nonzero()[:, 0].tolist())))
        if processes.is_main():
            summarise(len(found), len(self))

    def _encode(self, sample: Any, identity: Any) -> dict[str, Tensor]:
        sample = to_messages(sample, identity)
        name = f"sample {identity!r}"
        text, spans = render(sample, self.processor)
        with _breaking(f"{name}: "):
            images = [load_image(image) for image in sample["images"]]
        with _breaking():
            inputs = dict(encode(self.processor, [text], [images], name=name))
        ids = inputs["input_ids"][0]
        labels = align(text, spans, ids, self.processor, name)
        remedy = "shorten it" + ("" if self.max_length is None else " or raise max_length")
        limit = min(length for length in (self.max_length, self.context, len(ids)) if length is not None)
        if (labels[:limit] == IGNORE).all():
            raise BrokenSample(f"{name}: no answer within the first {limit} tokens; {remedy}")
        if torch.isin(ids[limit:], torch.tensor(self.processor.image_token_ids)).any():
            raise BrokenSample(f"{name}: an image comes after the first {limit} tokens; {remedy}")
        cut = {key: value[:, :limit] if is_per_token(value, len(ids)) else value for key, value in inputs.items()}
        return {**cut, "labels": labels[None, :limit]}


def render(sample: Mapping[str, Any], processor: Any) -> tuple[str, list[tuple[int, int]]]:
    """A sample as text, and where in it each answer begins and ends, in characters, its end token included.

    Args:
        sample: in the form of `to_messages`.
        processor: the base's processor, with a chat template.

    Raises:
        BrokenSample: the template refuses the conversation or is made for text alone, or a text holds the processor's
            image placeholder.
        TwigVLMError: the template cannot be trained with.
    """
    messages, name = sample["messages"], f"sample {sample['id']!r}"
    spans = []
    text = ""
    for end in (number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"):
        with _breaking():
            question = render_messages(processor, messages[: end - 1], name)
            answered = render_messages(processor, messages[:end], name, add_generation_prompt=False).rstrip()
        if not (question.startswith(text) and answered.startswith(question)):
            raise TwigVLMError(
                "chat template: rewrites earlier turns when one is added; give the processor one that only appends"
            )
        spans.append((len(question), len(answered)))
        text = answered
    # Some templates leave the end token to the trainer.
    if not text.endswith(tuple(processor.tokenizer.all_special_tokens)):
        text += processor.tokenizer.eos_token
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def align(text: str, spans: list[tuple[int, int]], ids: Tensor, processor: Any, name: str) -> Tensor:
    """Labels of the processor's ids, by the character spans of the answers.

    The processor expands each image's placeholder, so that its ids are the plain text's only between images. Those
    stretches are looked for from the end on, as far back as there are answers.

    Args:
        text: the rendered sample.
        spans: first character of each answer, and the one after its last.
        ids: the processor's ids of the text and its pictures, [tokens].
        processor: the processor.
        name: beginning of the message.

    Returns:
        Ids at answers, `IGNORE` elsewhere, [tokens].

    Raises:
        BrokenSample: a stretch is not found.
    """
    special = special_tokens(text, processor.tokenizer)
    encoded = processor.tokenizer(text, return_offsets_mapping=True, **special)
    plain, found = encoded["input_ids"], ids.tolist()
    answered = [
        any(start < last and stop > first for first, last in spans) for start, stop in encoded["offset_mapping"]
    ]
    labels = torch.full_like(ids, IGNORE)
    stop, end = len(plain), len(found)
    while any(answered[:stop]):
        start = max(answered.index(True), stop - _back(plain[:stop], _image_token(processor)))
        stretch = plain[start:stop]
        at = end - len(stretch)
        while stop < len(plain) and at >= 0 and found[at : at + len(stretch)] != stretch:
            at -= 1
        if at < 0 or found[at : at + len(stretch)] != stretch:
            raise BrokenSample(f"{name}: the processor tokenizes the answers otherwise than its tokenizer; drop it")
        chosen = torch.tensor(answered[start:stop])
        labels[at : at + len(stretch)] = torch.where(chosen, torch.tensor(stretch), IGNORE)
        stop, end = start - 1, at
    return labels


def is_per_token(value: Any, length: int) -> bool:
    """Whether a processor's output has one entry per token (ids, masks, token types)."""
    return isinstance(value, Tensor) and value.shape[:2] == (1, length)


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right to the longest of the batch, and joins the images of those that have some.

    Pictures of different sizes, or in different numbers of tiles, are filled up with zeros at their ends, as the processors
    themselves do within a batch; the models cut that off again.
    """

    pad_token_id: int
    """Id of padding; any valid id, since padding is masked."""

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One batch: `input_ids`, `attention_mask`, `labels`, and the processor's other tensors."""
        lengths = [sample["input_ids"].shape[1] for sample in samples]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE}
        batch = {}
        for key in dict.fromkeys(key for sample in samples for key in sample):
            rows = [sample[key] for sample in samples if key in sample]
            if all(
                is_per_token(sample[key], length)
                for sample, length in zip(samples, lengths, strict=True)
                if key in sample
            ):
                none = rows[0].new_zeros(1, 0)
                rows = [sample.get(key, none) for sample in samples]
            batch[key] = torch.cat(_filled(rows, fill.get(key, 0)))
        return batch


def _filled(rows: Sequence[Tensor], value: int) -> list[Tensor]:
    """All of the same size but for their first dimension, by `value` behind the smaller ones."""
    largest = [max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True)]

    def missing(row: Tensor) -> list[int]:
        pairs = reversed(list(zip(row.shape[1:], largest, strict=True)))  # the last dimension comes first
        return [number for size, whole in pairs for number in (0, whole - size)]

    return [torch.nn.functional.pad(row, missing(row), value=value) for row in rows]


def frequent_answer_tokens(samples: Samples, processor: Any, size: int) -> Tensor:
    """The `size` most frequent tokens of the answers, ascending: a small vocabulary for the twig to draft from.

    Where the answers have fewer, the lowest other ids fill it up. No image is read.

    Args:
        samples: as `load_samples` returns them.
        processor: the base's processor, with a chat template and a fast tokenizer.
        size: V_d, number of tokens.

    Returns:
        Ids, [size].

    Raises:
        TwigVLMError: the base has fewer tokens, or the template cannot be trained with.
    """
    tokenizer = processor.tokenizer
    if size > len(tokenizer):
        raise TwigVLMError(f"draft_vocabulary={size}: at most {len(tokenizer)}, the tokens of this base")
    counts: Counter[int] = Counter()
    for index in range(len(samples)):
        try:
            text, spans = render(to_messages(*read_sample(samples, index)), processor)
        except BrokenSample:  # reported when it is trained on
            continue
        encoded = tokenizer(text, return_offsets_mapping=True)
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if any(start < last and stop > first for first, last in spans):
                counts[token] += 1
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    others = (token for token in range(len(tokenizer)) if token not in counts)
    return torch.tensor(sorted((ranked + list(islice(others, max(0, size - len(ranked)))))[:size]))


@contextmanager
def _breaking(start: str = "") -> Iterator[None]:
    """Inside, bad input is a broken sample, whose message begins so."""
    try:
        yield
    except TwigVLMError as error:
        raise BrokenSample(f"{start}{error}") from None


def _image_token(processor: Any) -> int:
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def _back(ids: list[int], token: int) -> int:
    """How many ids follow the last `token`; all of them where there is none."""
    return ids[::-1].index(token) if token in ids else len(ids)
