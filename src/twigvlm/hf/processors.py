"""Logits processors and stopping criteria of one `generate` call, for rows that do not advance together.

Hugging Face calls each of these objects once per position with the whole left-padded batch. This library decodes each row
at its own speed, and a row of a batch gets the answer that it gets alone. So the objects are sorted into three lanes:

- "scores": Hugging Face's processors that look at the scores alone. They take any scores at once.
- "rows": Hugging Face's processors that count tokens, read ids or hold something for each row. Every row gets a processor of
  its own, which sees the ids of that row without its padding.
- "batch": everything else. That is what users write, classes that this module does not know, and guidance, which runs the
  model on all rows with a cache of its own. They get Hugging Face's contract: the whole padded batch, one call per
  position. With several rows that forces the rows to advance together.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    ClassifierFreeGuidanceLogitsProcessor,
    ConfidenceCriteria,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkLogitsProcessor,
)

from twigvlm import compat
from twigvlm.errors import TwigVLMError

Lane = Literal["scores", "rows", "batch"]


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
    call `on_row` and `on_batch` once for each position that is decoded, in order, and never behind a drafted token that
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
            scores: of its next token.
        """
        for stage in self.stages:
            if stage.lane == "batch":
                scores = _as_in_generate(stage.processors[0], _padded(self.hidden_ids[row], ids), scores)
            else:
                scores = stage.processors[row if stage.lane == "rows" else 0](ids, scores)
        return scores

    def on_batch(
        self, ids: Int[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocabulary"], unfinished: Sequence[int]
    ) -> Float[Tensor, "batch vocabulary"]:
        """Processed scores of the next token of all rows, which stand at the same position.

        Args:
            ids: padded prompts and new tokens; a finished row goes on with the padding token.
            scores: of the next tokens; those of finished rows may be any finite numbers, and mean nothing afterwards.
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


@dataclass(frozen=True)
class Stopping:
    """When the answers of a request end: by whichever comes first."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]
    rows: StoppingCriteriaList
    """Hugging Face's criteria that look at the end of a row or at the clock."""
    batch: StoppingCriteriaList
    """All other criteria, which get the whole padded batch."""
    hidden_ids: tuple[Int[Tensor, "1 _"], ...]
    """What pads each row on the left."""

    @property
    def needs_ids(self) -> bool:
        """Whether `on_row` or `on_batch` must be asked after every token; two plain numbers decide otherwise."""
        return bool(self.rows or self.batch)

    @property
    def needs_lockstep(self) -> bool:
        """Whether rows must advance together and be asked about by `on_batch`."""
        return len(self.hidden_ids) > 1 and bool(self.batch)

    def on_row(self, row: int, ids: Int[Tensor, "1 tokens"]) -> bool:
        """Whether criteria end a row, apart from the two plain numbers; without `needs_lockstep`.

        Args:
            row: index of the row in the request.
            ids: its prompt without padding, and its new tokens.
        """
        flags = self.rows(ids, None) | _flags(self.batch, _padded(self.hidden_ids[row], ids))
        return bool(flags)

    def on_batch(self, ids: Int[Tensor, "batch tokens"], unfinished: Sequence[int]) -> Bool[Tensor, " batch"]:
        """Which rows the criteria end, apart from the two plain numbers. A finished row's flag means nothing.

        Args:
            ids: padded prompts and new tokens; a finished row goes on with the padding token.
            unfinished: rows whose answers went on up to the newest token.
        """
        flags = _flags(self.batch, ids)
        for row in unfinished if self.rows else ():
            flags[row] |= self.rows(ids[row : row + 1, self.hidden_ids[row].shape[1] :], None)[0]
        return flags


def split_processors(
    processors: LogitsProcessorList,
    input_ids: Int[Tensor, "batch tokens"],
    padding: Sequence[int],
    config: GenerationConfig,
) -> Lanes:
    """Sort the processors that Hugging Face's `generate` prepared into lanes; their order is kept.

    Args:
        processors: for the padded batch, the user's among them.
        input_ids: padded prompts, one for each answer, on the device of the scores.
        padding: number of padding tokens on the left of each row.
        config: of the call; says whether a least length counts the prompt's tokens.

    Raises:
        TwigVLMError: a processor that Hugging Face's `generate` cannot call, or one made for another number of rows.
    """
    rows = [
        _Row(index, input_ids[index : index + 1], hidden, len(input_ids), config.min_new_tokens is not None)
        for index, hidden in enumerate(padding)
    ]
    stages = []
    for lane, group in groupby(processors, _lane):
        members = list(group)
        if lane == "rows":
            made = [LogitsProcessorList(_FOR_ROW[type(one)](one, row) for one in members) for row in rows]
            stages.append(Stage(lane, tuple(made)))
            continue
        if lane == "batch":
            for processor in members:
                _check_call(processor, len(input_ids))
        stages.append(Stage(lane, (LogitsProcessorList(members),)))
    return Lanes(tuple(stages), tuple(row.hidden_ids for row in rows))


def split_criteria(
    criteria: StoppingCriteriaList, input_ids: Int[Tensor, "batch tokens"], padding: Sequence[int]
) -> Stopping:
    """Sort the stopping criteria that Hugging Face's `generate` prepared: plain numbers, rows' criteria and the batch's.

    Args:
        criteria: for the padded batch, the user's among them.
        input_ids: padded prompts, one for each answer.
        padding: number of padding tokens on the left of each row.

    Raises:
        TwigVLMError: nothing limits the answers' length, or a criterion needs scores.
    """
    lengths: list[int] = []
    eos_token_ids: set[int] = set()
    rows, batch = StoppingCriteriaList(), StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos_token_ids.update(int(token) for token in criterion.eos_token_id.flatten().tolist())
        elif type(criterion) is ConfidenceCriteria:
            raise TwigVLMError("ConfidenceCriteria: needs scores, which criteria do not get with a twig; leave it out")
        elif type(criterion) in (StopStringCriteria, MaxTimeCriteria):
            rows.append(criterion)
        else:
            batch.append(criterion)
    if not lengths:
        raise TwigVLMError("max_new_tokens is not set: pass max_new_tokens")
    # Hugging Face's loop asks its criteria after a token, so every answer has one.
    limit = max(min(lengths) - input_ids.shape[1], 1)
    hidden_ids = tuple(input_ids[row : row + 1, :count] for row, count in enumerate(padding))
    return Stopping(limit, frozenset(eos_token_ids), rows, batch, hidden_ids)


@dataclass(frozen=True)
class _Row:
    """What a row's processors are made from."""

    index: int
    padded_prompt: Int[Tensor, "1 tokens"]
    padding: int
    batch: int
    min_length_counts_prompt: bool

    @property
    def hidden_ids(self) -> Tensor:
        return self.padded_prompt[:, : self.padding]

    @property
    def prompt(self) -> Tensor:
        return self.padded_prompt[:, self.padding :]

    def among(self, prompts: int) -> int:
        """Index of the row's prompt; each prompt has equally many answers, one after another."""
        return self.index * prompts // self.batch


def _unchanged(processor: Any, row: _Row) -> Any:
    """Shared by all rows: it reads the ids that it is called with, and remembers nothing of them."""
    return processor


def _shortened(length: str) -> Callable[[Any, _Row], Any]:
    """Makes processors for a row from one that keeps a length of the padded sequence in this attribute."""

    def for_row(processor: Any, row: _Row) -> Any:
        return _with(processor, **{length: getattr(processor, length) - row.padding})

    return for_row


def _min_length(processor: Any, row: _Row) -> Any:
    # `min_new_tokens` becomes a least length of padded prompt and answer; `min_length` itself is not about the padding.
    padding = row.padding if row.min_length_counts_prompt else 0
    return _with(processor, min_length=processor.min_length - padding)


def _repetition_penalty(processor: Any, row: _Row) -> Any:
    ignored = processor.prompt_ignore_length
    if isinstance(ignored, Tensor):
        if len(ignored) != row.batch:
            raise TwigVLMError(
                f"prompt_ignore_length: has {len(ignored)} lengths for {row.batch} answers; give one for each"
            )
        ignored = int(ignored[row.index])
    return _with(processor, prompt_ignore_length=None if ignored is None else max(ignored - row.padding, 0))


def _encoder_repetition_penalty(processor: Any, row: _Row) -> Any:
    index = row.among(len(processor.encoder_input_ids))
    ids = processor.encoder_input_ids[index : index + 1].to(row.padded_prompt.device)
    return _with(processor, encoder_input_ids=row.prompt if torch.equal(ids, row.padded_prompt) else ids)


def _encoder_ngrams(processor: Any, row: _Row) -> Any:
    def ngrams(ids: Tensor) -> Any:
        return EncoderNoRepeatNGramLogitsProcessor(processor.ngram_size, ids).generated_ngrams

    found = [processor.generated_ngrams[row.among(processor.batch_size)]]
    if row.padding and found == ngrams(row.padded_prompt):
        found = ngrams(row.prompt)
    return _with(processor, batch_size=1, generated_ngrams=found)


def _prefix_constrained(processor: Any, row: _Row) -> Any:
    function = compat.prefix_function(processor)

    def allowed(_: int, ids: Tensor) -> Any:
        # The function is the user's, who counts on the row's number in the batch and on its padding.
        tokens = function(row.index, torch.cat((row.hidden_ids[0], ids)))
        if len(tokens) == 0:
            raise TwigVLMError(
                f"prefix_allowed_tokens_fn: allows no token in row {row.index} behind {len(ids)} tokens; "
                "return one token or more"
            )
        return tokens

    return PrefixConstrainedLogitsProcessor(allowed, num_beams=1)


def _synth_id(processor: Any, row: _Row) -> Any:
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

_FOR_ROW: dict[type, Callable[[Any, _Row], Any]] = {
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


def _lane(processor: Any) -> Lane:
    """By the exact class: a subclass may do anything, so it gets Hugging Face's contract like every class not known here."""
    kind = type(processor)
    if kind in _SCORES:
        return "scores"
    if kind in (NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor):
        return "scores" if all(len(ids) == 1 for ids in processor.sequence_bias) else "rows"
    return "rows" if kind in _FOR_ROW else "batch"


def _check_call(processor: Any, batch: int) -> None:
    """Refuse what Hugging Face's `generate` could not call either, before any work."""
    name = type(processor).__name__
    if not callable(processor):
        raise TwigVLMError(f"logits_processor: {name} is not callable; pass objects that take (input_ids, scores)")
    parameters = list(inspect.signature(processor.__call__).parameters)
    if len(parameters) > 2:
        raise TwigVLMError(
            f"logits_processor: {name} takes ({', '.join(parameters)}), but generate passes (input_ids, scores); "
            "leave out the others"
        )
    if type(processor) is ClassifierFreeGuidanceLogitsProcessor:
        raise TwigVLMError(f"{name}: needs scores of two prompts for each answer; pass guidance_scale instead")
    if type(processor) is UnbatchedClassifierFreeGuidanceLogitsProcessor:
        negative = processor.unconditional_context["input_ids"]
        if negative is not None and len(negative) != batch:
            raise TwigVLMError(f"negative_prompt_ids: has {len(negative)} rows for {batch} answers; give one for each")


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


def _flags(criteria: StoppingCriteriaList, ids: Tensor) -> Tensor:
    """Which rows of the whole padded batch these criteria end, [batch]."""
    flags = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for criterion in criteria:
        done = criterion(ids, None)
        shape = tuple(done.shape) if isinstance(done, Tensor) else type(done).__name__
        if shape not in ("bool", (), (1,), (len(ids),)):
            raise TwigVLMError(
                f"stopping_criteria: {type(criterion).__name__} returned {shape}; return a bool for each row, ({len(ids)},)"
            )
        flags = flags | done
    return flags


def _padded(hidden_ids: Tensor, ids: Tensor) -> Tensor:
    return torch.cat((hidden_ids, ids), dim=1) if hidden_ids.shape[1] else ids


def _with(processor: Any, **attributes: Any) -> Any:
    """A copy of a processor with other attributes."""
    changed = copy.copy(processor)
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed
