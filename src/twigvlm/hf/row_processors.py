"""How Hugging Face's logits processors for a padded batch become processors for a row alone, without its padding."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from twigvlm import compat
from twigvlm.errors import TwigVLMError

Lane = Literal["scores", "rows", "batch"]
"""Who gets a processor: see `twigvlm.hf.processors`."""


@dataclass(frozen=True)
class BatchRow:
    """What a row's processors are made from."""

    index: int
    padded_prompt: Int[Tensor, "1 tokens"]
    padding: int
    batch: int
    min_length_counts_prompt: bool

    @property
    def hidden_ids(self) -> Tensor:
        """What pads the row on the left, [1, padding]."""
        return self.padded_prompt[:, : self.padding]

    @property
    def prompt(self) -> Tensor:
        """Its prompt without padding, [1, tokens]."""
        return self.padded_prompt[:, self.padding :]

    def among(self, prompts: int) -> int:
        """Index of the row's prompt; each prompt has equally many answers, one after another."""
        return self.index * prompts // self.batch


def _unchanged(processor: Any, row: BatchRow) -> Any:
    """Shared by all rows: it reads the ids that it is called with, and remembers nothing of them."""
    return processor


def _shortened(length: str) -> Callable[[Any, BatchRow], Any]:
    """Makes processors for a row from one that keeps a length of the padded sequence in this attribute."""

    def for_row(processor: Any, row: BatchRow) -> Any:
        return _with(processor, **{length: getattr(processor, length) - row.padding})

    return for_row


def _min_length(processor: Any, row: BatchRow) -> Any:
    # `min_new_tokens` becomes a least length of padded prompt and answer; `min_length` itself is not about the padding.
    padding = row.padding if row.min_length_counts_prompt else 0
    return _with(processor, min_length=processor.min_length - padding)


def _repetition_penalty(processor: Any, row: BatchRow) -> Any:
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, Tensor):
        if len(ignored) != row.batch:
            raise TwigVLMError(
                f"prompt_ignore_length: has {len(ignored)} lengths for {row.batch} answers; give one for each"
            )
        ignored = int(ignored[row.index])
    return _with(processor, prompt_ignore_length=None if ignored is None else max(ignored - row.padding, 0))


def _encoder_repetition_penalty(processor: Any, row: BatchRow) -> Any:
    index = row.among(len(processor.encoder_input_ids))
    ids = processor.encoder_input_ids[index : index + 1].to(row.padded_prompt.device)
    return _with(processor, encoder_input_ids=row.prompt if torch.equal(ids, row.padded_prompt) else ids)


def _encoder_ngrams(processor: Any, row: BatchRow) -> Any:
    def ngrams(ids: Tensor) -> Any:
        return EncoderNoRepeatNGramLogitsProcessor(processor.ngram_size, ids).generated_ngrams

    found = [processor.generated_ngrams[row.among(processor.batch_size)]]
    if row.padding and found == ngrams(row.padded_prompt):
        found = ngrams(row.prompt)
    return _with(processor, batch_size=1, generated_ngrams=found)


def _prefix_constrained(processor: Any, row: BatchRow) -> Any:
    function = compat.prefix_function(processor)

    def allowed(_: int, ids: Tensor) -> Any:
        # The function is the user's, who counts on the row's number in the batch and on its padding.
        tokens = function(row.index, torch.cat((row.hidden_ids[0], ids)))
        if len(tokens) == 0:
            raise TwigVLMError(
                f"prefix_allowed_tokens_fn: allows no token in row {row.index} after {len(ids)} tokens; "
                "return one token or more"
            )
        return tokens

    return PrefixConstrainedLogitsProcessor(allowed, num_beams=1)


def _synth_id(processor: Any, row: BatchRow) -> Any:
    return _with(processor, state=None)


_SCORES = frozenset(
    {
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        InfNanRemoveLogitsProcessor,
        LogitNormalization,
        MinPLogitsWarper,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopHLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    }
)
"""Processors that look at the scores alone, each row by itself."""

FOR_ROW: dict[type, Callable[[Any, BatchRow], Any]] = {
    EncoderNoRepeatNGramLogitsProcessor: _encoder_ngrams,
    EncoderRepetitionPenaltyLogitsProcessor: _encoder_repetition_penalty,
    ExponentialDecayLengthPenalty: _shortened("regulation_start"),
    ForcedBOSTokenLogitsProcessor: _unchanged,
    ForcedEOSTokenLogitsProcessor: _shortened("max_length"),
    MinLengthLogitsProcessor: _min_length,
    MinNewTokensLengthLogitsProcessor: _shortened("prompt_length_to_skip"),
    NoBadWordsLogitsProcessor: _unchanged,
    NoRepeatNGramLogitsProcessor: _unchanged,
    PrefixConstrainedLogitsProcessor: _prefix_constrained,
    RepetitionPenaltyLogitsProcessor: _repetition_penalty,
    SequenceBiasLogitsProcessor: _unchanged,
    SuppressTokensAtBeginLogitsProcessor: _shortened("begin_index"),
    SynthIDTextWatermarkLogitsProcessor: _synth_id,
    WatermarkLogitsProcessor: _unchanged,  # its generator is seeded from the ids at every call
}
"""How a processor for the padded batch becomes one for a row alone, without padding."""


def lane_of(processor: Any) -> Lane:
    """By the exact class: a subclass may do anything, so it gets Hugging Face's contract like every class not known here."""
    kind = type(processor)
    if kind in _SCORES:
        return "scores"
    if kind in (NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor):
        return "scores" if all(len(ids) == 1 for ids in processor.sequence_bias) else "rows"
    return "rows" if kind in FOR_ROW else "batch"


def _with(processor: Any, **attributes: Any) -> Any:
    """A copy of a processor with other attributes."""
    changed = copy.copy(processor)
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed
