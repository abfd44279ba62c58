"""Logits processors of one `generate` call, for rows that do not advance together.

Hugging Face calls each of these objects once per position with the whole left-padded batch. This library decodes each row
at its own speed, and a row of a batch gets the answer that it gets alone. So the objects are sorted into three lanes:

- "scores": Hugging Face's processors that look at the scores alone. They take any scores at once.
- "rows": Hugging Face's processors that count tokens, read ids or hold something for each row. Every row gets a processor of
  its own, which sees the ids of that row without its padding.
- "batch": everything else. That is what users write, classes that this module does not know, and guidance, which runs the
  model on all rows with a cache of its own. They get Hugging Face's contract: the whole padded batch, one call per
  position. With several rows that forces the rows to advance together.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    ClassifierFreeGuidanceLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from twigvlm.errors import TwigVLMError
from twigvlm.hf.row_processors import FOR_ROW, BatchRow, Lane, lane_of
from twigvlm.hf.stopping import padded


@dataclass(frozen=True)
class Stage:
    """Neighbouring processors of one lane, in Hugging Face's order."""

    lane: Lane
    processors: tuple[LogitsProcessorList, ...]
    """One list for each row in the lane "rows", and a single list in the others."""


@dataclass(frozen=True)
class Lanes:
    """The logits processors of a request.

    Pass float32 scores that nothing else needs: processors of users may write into them. Processors can have a state, so
    call `on_row` and `on_batch` once for each position that is decoded, in order, and never after a drafted token that
    may be rejected.
    """

    stages: tuple[Stage, ...]
    hidden_ids: tuple[Int[Tensor, "1 _"], ...]
    """What pads each row on the left."""

    @property
    def needs_ids(self) -> bool:
        """Whether a processor looks at more than the scores; `on_scores` is for requests without."""
        return any(stage.lane != "scores" for stage in self.stages)

    @property
    def needs_lockstep(self) -> bool:
        """Whether rows must advance together and be processed by `on_batch`."""
        return len(self.hidden_ids) > 1 and any(stage.lane == "batch" for stage in self.stages)

    @property
    def has_state(self) -> bool:
        """Whether one of them may remember what it was asked, as those of users, guidance and SynthID's watermark do."""
        ours = (processor for stage in self.stages for processors in stage.processors for processor in processors)
        remembers = any(isinstance(processor, SynthIDTextWatermarkLogitsProcessor) for processor in ours)
        return remembers or any(stage.lane == "batch" for stage in self.stages)

    def on_scores(self, scores: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n vocabulary"]:
        """Processed scores of any rows and positions at once; without `needs_ids`."""
        no_ids = torch.empty(len(scores), 0, dtype=torch.long, device=scores.device)
        for stage in self.stages:
            scores = stage.processors[0](no_ids, scores)
        return scores

    def on_row(
        self, row: int, ids: Int[Tensor, "1 tokens"], scores: Float[Tensor, "1 vocabulary"]
    ) -> Float[Tensor, "1 vocabulary"]:
        """Processed scores of the next token of one row; without `needs_lockstep`.

        Args:
            row: index of the row in the request.
            ids: its prompt without padding, and its new tokens.
            scores: scores of its next token.
        """
        for stage in self.stages:
            if stage.lane == "batch":
                scores = _as_in_generate(stage.processors[0], padded(self.hidden_ids[row], ids), scores)
            else:
                scores = stage.processors[row if stage.lane == "rows" else 0](ids, scores)
        return scores

    def on_batch(
        self, ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"], unfinished: Sequence[int]
    ) -> Float[Tensor, "batch vocabulary"]:
        """Processed scores of the next token of all rows, which stand at the same position.

        Args:
            ids: padded prompts and new tokens; a finished row goes on with the padding token.
            scores: scores of the next tokens; those of finished rows may be any finite numbers, and mean nothing afterwards.
            unfinished: rows whose answers go on.
        """
        for stage in self.stages:
            if stage.lane == "batch":
                scores = _as_in_generate(stage.processors[0], ids, scores)
            elif stage.lane == "scores":
                scores = stage.processors[0](ids, scores)
            else:
                processed = scores.clone()
                for row in unfinished:
                    row_ids = ids[row : row + 1, self.hidden_ids[row].shape[1] :]
                    processed[row] = stage.processors[row](row_ids, scores[row : row + 1])[0]
                scores = processed
        return scores


def split_processors(
    processors: LogitsProcessorList,
    input_ids: Int[Tensor, "batch tokens"],
    padding: Sequence[int],
    config: GenerationConfig,
    vocabulary: int,
) -> Lanes:
    """Sort the processors that Hugging Face's `generate` prepared into lanes; their order is kept.

    Args:
        processors: for the padded batch, the user's among them.
        input_ids: padded prompts, one for each answer, on the device of the scores.
        padding: number of padding tokens on the left of each row.
        config: configuration of the call; says whether a least length counts the prompt's tokens.
        vocabulary: number of tokens that have a score.

    Raises:
        TwigVLMError: a processor that Hugging Face's `generate` cannot call, or one made for another number of rows or for
            tokens that have no score.
    """
    for processor in processors:
        _check_token_ids(processor, vocabulary)
    rows = [
        BatchRow(index, input_ids[index : index + 1], hidden, len(input_ids), config.min_new_tokens is not None)
        for index, hidden in enumerate(padding)
    ]
    stages = []
    for lane, group in groupby(processors, lane_of):
        members = list(group)
        if lane == "rows":
            made = [LogitsProcessorList(FOR_ROW[type(member)](member, row) for member in members) for row in rows]
            stages.append(Stage(lane, tuple(made)))
            continue
        if lane == "batch":
            for processor in members:
                _check_call(processor, len(input_ids))
        stages.append(Stage(lane, (LogitsProcessorList(members),)))
    return Lanes(tuple(stages), tuple(row.hidden_ids for row in rows))


def _check_call(processor: Any, batch: int) -> None:
    """Refuse what Hugging Face's `generate` could not call either, before any work."""
    name = type(processor).__name__
    if not callable(processor):
        raise TwigVLMError(f"logits_processor: {name} is not callable; pass objects that take (input_ids, scores)")
    # An object's own `__call__` must have no further parameters; whatever else can be called may have some with defaults.
    is_object, taken = inspect.isfunction(type(processor).__call__), inspect.signature(processor).parameters
    needed = {name for name, each in taken.items() if each.default is each.empty and each.kind is not each.VAR_KEYWORD}
    parameters = [name for name in taken if is_object or name in needed]
    if len(parameters) > 2:
        raise TwigVLMError(
            f"logits_processor: {name} takes ({', '.join(parameters)}), but generate passes (input_ids, scores); "
            "remove the other parameters"
        )
    if type(processor) is ClassifierFreeGuidanceLogitsProcessor:
        raise TwigVLMError(f"{name}: needs scores of two prompts for each answer; pass guidance_scale instead")
    if type(processor) is UnbatchedClassifierFreeGuidanceLogitsProcessor:
        negative = processor.unconditional_context["input_ids"]
        if negative is not None and len(negative) != batch:
            raise TwigVLMError(f"negative_prompt_ids: has {len(negative)} rows for {batch} answers; give one for each")


def _biased(processor: Any) -> list[int]:
    return [token for tokens in processor.sequence_bias for token in tokens]


_TOKEN_IDS: dict[type, tuple[str, Callable[[Any], list[int]]]] = {
    ForcedBOSTokenLogitsProcessor: ("forced_bos_token_id", lambda processor: [processor.bos_token_id]),
    ForcedEOSTokenLogitsProcessor: ("forced_eos_token_id", lambda processor: processor.eos_token_id.flatten().tolist()),
    NoBadWordsLogitsProcessor: ("bad_words_ids", _biased),
    SequenceBiasLogitsProcessor: ("sequence_bias", _biased),
}
"""Options whose processors write to the scores of these token ids."""


def _check_token_ids(processor: Any, vocabulary: int) -> None:
    """Refuse token ids without a score, which would fail when the scores are there."""
    name, ids_of = _TOKEN_IDS.get(type(processor), ("", lambda _: []))
    largest = max(ids_of(processor), default=0)
    if largest >= vocabulary:
        raise TwigVLMError(
            f"{name}: has the token id {largest}; give ids below {vocabulary}, the size of the vocabulary"
        )


def _as_in_generate(processors: LogitsProcessorList, ids: Tensor, scores: Tensor) -> Tensor:
    """Scores of the whole padded batch after each of these processors."""
    for processor in processors:
        processed = processor(ids, scores)
        shape = tuple(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
        if shape != tuple(scores.shape):
            raise TwigVLMError(
                f"logits_processor: {type(processor).__name__} returned {shape}; return scores {tuple(scores.shape)}"
            )
        scores = processed
    return scores
