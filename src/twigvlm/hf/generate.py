"""Between Hugging Face's `generate`, which prepares and checks, and this library's decoding loop."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
)

from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.engine.loop import Stops, decode
from twigvlm.engine.prefill import Plan
from twigvlm.engine.prefix_cache import PrefixCache
from twigvlm.engine.sampling import Noise, Sampling
from twigvlm.engine.timing import Timings
from twigvlm.errors import TwigVLMError
from twigvlm.speculation.costs import StepCosts
from twigvlm.twig.block import Twig

_LENGTHS: dict[type, str] = {
    MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    SuppressTokensAtBeginLogitsProcessor: "begin_index",
    ForcedEOSTokenLogitsProcessor: "max_length",
    ExponentialDecayLengthPenalty: "regulation_start",
}
"""Where processors keep a length that includes the padded prompt's; with `min_new_tokens` the least length of all does too."""


@dataclass(frozen=True)
class TwigOutput:
    """What `generate(return_dict_in_generate=True)` returns."""

    sequences: Int[Tensor, "batch length"]
    """Prompt ids and new ids; behind the end of a shorter answer the padding token."""
    kept_indices: list[Int[Tensor, " _"]] | None
    """For each prompt, positions of the visual tokens kept after layer K, ascending; None without pruning."""
    drafted_lengths: list[list[int]]
    """For each prompt, tokens drafted for each step; of a tree, its nodes that were verified."""
    accepted_lengths: list[list[int]]
    """For each prompt, drafted tokens accepted in each step; each step adds one token of the base's own unless it ends the
    answer."""
    timings: Timings
    """Seconds of prefill, draft, verify and the whole, of all prompts together."""
    costs: StepCosts | None
    """What `auto` reckoned with; None for other ways of speculation."""


@dataclass
class HFGenerateAdapter:
    """One call of `generate`, as Hugging Face's `generate` runs it in place of a loop of its own.

    Args:
        base: the base.
        twig: its twig.
        plan: what to keep of prompts with so many visual tokens.
        speculation: how to draft.
        began: when the call began, by the device's clock.
        streamer: of `generate`.
        generator: what sampling draws from; None: torch's own.
        costs: what `auto` reckons with.
        memory: of a conversation.
    """

    base: BaseVLM
    twig: Twig
    plan: Callable[[Sequence[int]], Plan]
    speculation: SpeculationConfig
    began: float
    streamer: Any
    generator: torch.Generator | None
    costs: StepCosts | None
    memory: PrefixCache | None
    entered: bool = False
    """Whether Hugging Face's `generate` accepted the arguments."""

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch tokens"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | TwigOutput:
        """The answers.

        Raises:
            TwigVLMError: a way to generate that the loop does not know, several answers for a streamer or a conversation, or a
                conversation's prompt with padding.
        """
        self.entered = True
        _check_generation(generation_config)
        self._check_rows(len(input_ids))
        for name in ("past_key_values", "use_cache"):
            model_kwargs.pop(name, None)
        model_kwargs = {name: value for name, value in model_kwargs.items() if value is not None}
        mask = model_kwargs.get("attention_mask")
        padding = [0] * len(input_ids) if mask is None else (mask == 0).sum(dim=1).tolist()
        if self.memory is not None and any(padding):
            raise TwigVLMError(f"attention_mask: hides {padding[0]} tokens; a conversation's prompt has no padding")
        with torch.inference_mode():
            answers = decode(
                self.base,
                self.twig,
                {"input_ids": input_ids, **model_kwargs},
                self.plan,
                self.speculation,
                _stops(stopping_criteria, input_ids.shape[1]),
                _samplings(self.base, padding, logits_processor, generation_config, self.generator),
                _emitter(self.streamer),
                self.began,
                self.costs,
                self.memory,
            )
        if self.streamer is not None:
            self.streamer.end()
        ids = _sequences(input_ids, answers.tokens, generation_config.pad_token_id)
        if not generation_config.return_dict_in_generate:
            return ids
        kept = _kept_positions(answers.kept, padding)
        return TwigOutput(ids, kept, answers.drafted_lengths, answers.accepted_lengths, answers.timings, self.costs)

    def _check_rows(self, rows: int) -> None:
        if rows > 1 and self.streamer is not None:
            raise TwigVLMError(f"streamer: takes one answer, not {rows}; leave it out, or ask for one")
        if rows > 1 and self.memory is not None:
            raise TwigVLMError(f"{rows} answers: a conversation goes on with one; ask for one")


def check_arguments(kwargs: dict[str, Any], defaults: GenerationConfig) -> None:
    """Refuse, before any work, what this loop would otherwise have to drop."""
    if kwargs.get("input_ids") is None:
        raise TwigVLMError("input_ids is missing: pass the processor's outputs")
    mask = kwargs.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise TwigVLMError(
            "attention_mask: hides tokens behind others; pad on the left, with processor.tokenizer.padding_side = 'left'"
        )
    if mask is not None and not bool(mask[:, -1].all()):
        raise TwigVLMError("attention_mask: hides all of a prompt; leave that prompt out")
    given = kwargs.get("generation_config")
    for config in (kwargs, vars(given) if given is not None else {}, vars(defaults)):
        if config.get("max_new_tokens") is not None:
            if config["max_new_tokens"] < 1:
                raise TwigVLMError(f"max_new_tokens={config['max_new_tokens']}: must be 1 or more")
            break
    for name in ("assistant_model", "custom_generate", "past_key_values", "inputs_embeds", "synced_gpus"):
        if kwargs.get(name) is not None:
            raise TwigVLMError(f"{name} is not supported with a twig: leave it out, or use model.disabled()")


def _check_generation(config: GenerationConfig) -> None:
    """Refuse ways to generate that the loop does not know."""
    if config.num_beams is not None and config.num_beams > 1:
        raise TwigVLMError(
            f"num_beams={config.num_beams}: beams are not supported with a twig; pass num_beams=1, or sample several answers "
            "with do_sample=True and num_return_sequences"
        )
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise TwigVLMError(
            f"{config.get_generation_mode().value}: greedy decoding and sampling are supported; leave its options out"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise TwigVLMError(f"{name}=True is not supported with a twig: leave it out, or use model.disabled()")
    if config.use_cache is False:
        raise TwigVLMError("use_cache=False: a twig needs the cache; leave it out")
    if config.cache_implementation is not None:
        raise TwigVLMError(
            f"cache_implementation={config.cache_implementation!r}: pruning needs its own cache; leave it out"
        )


def with_stop_strings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with stop strings as a criterion: `generate` with a custom loop does not pass its tokenizer on."""
    rest = dict(kwargs)
    tokenizer, strings, config = (
        rest.pop("tokenizer", None),
        rest.pop("stop_strings", None),
        rest.get("generation_config"),
    )
    if strings is None and config is not None and config.stop_strings is not None:
        strings = config.stop_strings
        rest["generation_config"] = copy.deepcopy(config)
        rest["generation_config"].stop_strings = None
    if strings is None:
        return rest
    if tokenizer is None:
        raise TwigVLMError("stop_strings: needs the tokenizer too, pass tokenizer=processor.tokenizer")
    criteria = StoppingCriteriaList(rest.pop("stopping_criteria", None) or [])
    criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    return {**rest, "stopping_criteria": criteria}


def _stops(criteria: StoppingCriteriaList, prompt_length: int) -> Stops:
    """Split criteria into those that plain integers decide and those that must be asked."""
    length: int | None = None
    ends: set[int] = set()
    others = StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            length = criterion.max_length if length is None else min(length, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            ends.update(int(token) for token in criterion.eos_token_id.flatten().tolist())
        else:
            others.append(criterion)
    if length is None:
        raise TwigVLMError("max_new_tokens is not set: pass max_new_tokens")
    return Stops(length - prompt_length, frozenset(ends), others if len(others) else None)


def _emitter(streamer: Any) -> Callable[[int], None]:
    """Takes each new token of the answer."""
    if streamer is None:
        return lambda token: None
    return lambda token: streamer.put(torch.tensor([token]))


def _sequences(input_ids: Tensor, tokens: Sequence[Sequence[int]], pad_token_id: int | None) -> Tensor:
    """Prompts and answers, [batch, length]."""
    longest = max(map(len, tokens))
    filled = [[*row, *[pad_token_id or 0] * (longest - len(row))] for row in tokens]
    return torch.cat((input_ids, input_ids.new_tensor(filled)), dim=1)


def _kept_positions(kept: Bool[Tensor, "batch tokens"] | None, padding: Sequence[int]) -> list[Tensor] | None:
    """Where the kept visual tokens stand in the prompts as they were given, so much padding included."""
    if kept is None:
        return None
    return [row.nonzero()[:, 0].clone() + count for row, count in zip(kept, padding, strict=True)]


def _samplings(
    base: BaseVLM,
    padding: Sequence[int],
    processors: LogitsProcessorList,
    config: GenerationConfig,
    generator: torch.Generator | None,
) -> list[Sampling]:
    """How each row chooses its tokens.

    Args:
        base: the base.
        padding: of each row, in tokens.
        processors: of `generate`.
        config: of `generate`; says whether to sample.
        generator: what sampling draws from; None: torch's own.
    """
    if generator is not None and not config.do_sample:
        raise TwigVLMError("generator: needs do_sample=True, greedy decoding draws nothing")
    rows = len(padding)
    noises: list[Noise | None] = [None] * rows
    if config.do_sample:
        device = base.device
        if generator is not None and generator.device.type != device.type and rows == 1:
            raise TwigVLMError(
                f"generator: is on {str(generator.device)!r}, the base on {str(device)!r}; make it by torch.Generator(device)"
            )
        streams = [generator] if rows == 1 else _streams(rows, device, generator)
        temperature = 1.0 if config.temperature is None else config.temperature
        noises = [Noise(temperature, base.vocabulary, device, stream) for stream in streams]
    lengths = _LENGTHS if config.min_new_tokens is None else {**_LENGTHS, MinLengthLogitsProcessor: "min_length"}
    of_rows = (_of_row(processors, row, count, lengths) for row, count in enumerate(padding))
    return [Sampling(one if len(one) else None, noise) for one, noise in zip(of_rows, noises, strict=True)]


def _streams(rows: int, device: torch.device, generator: torch.Generator | None) -> list[torch.Generator | None]:
    """A random stream for each row, so that none depends on how far the others are."""
    where = device if generator is None else generator.device
    seeds = torch.randint(2**62, (rows,), generator=generator, device=where).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _of_row(processors: LogitsProcessorList, row: int, padding: int, lengths: dict[type, str]) -> LogitsProcessorList:
    """Processors that get one row of a batch at a time, without its padding: one asks which row, some count its tokens."""

    def of_row(processor: Any) -> Any:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = processor._prefix_allowed_tokens_fn
            return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
        length = lengths.get(type(processor))
        if length is None or not padding:
            return processor
        own = copy.copy(processor)
        setattr(own, length, getattr(own, length) - padding)
        return own

    return LogitsProcessorList(map(of_row, processors))
