"""Between Hugging Face's `generate`, which prepares and checks, and this library's decoding loop."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

from twigvlm import compat
from twigvlm.base.vision import ReadVision
from twigvlm.base.vlm import BaseVLM
from twigvlm.engine.engine import Engine
from twigvlm.engine.noise import Noise
from twigvlm.engine.row import Request, Row
from twigvlm.errors import TwigVLMError
from twigvlm.hf.checks import check_generation, check_mask, check_rows
from twigvlm.hf.processors import split_processors
from twigvlm.hf.stopping import split_criteria
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.cut import Cut, Pruner, average_of
from twigvlm.pruning.refocus import Look
from twigvlm.timing import Timings


@dataclass(frozen=True)
class TwigOutput:
    """What `generate(return_dict_in_generate=True)` returns."""

    sequences: Int[Tensor, "batch length"]
    """Prompt ids followed by new ids; shorter answers end with padding tokens."""
    kept_indices: list[Int[Tensor, " _"]] | None
    """For each prompt, positions of the visual tokens that pruning kept, ascending; None without pruning."""
    average_visual: list[float]
    """For each prompt R̄, the number of visual tokens that enter a layer, averaged over all layers, scouting included."""
    looks: list[list[Look]] | None
    """For each prompt, later choices of the kept visual tokens; None without `refocus`."""
    drafted_lengths: list[list[int]]
    """For each prompt, the number of tokens drafted in each step, the prefill first; of a tree, its verified nodes."""
    accepted_lengths: list[list[int]]
    """For each prompt, the number of drafted tokens accepted in each step. Each step also adds one token chosen by
    the base, unless an accepted token ends the answer."""
    timings: Timings
    """Seconds of prefill, drafting, verification and in total, of all prompts together."""


Schedule = Callable[[int], tuple[Cut, ...]]
"""Visual tokens of a prompt -> its cuts; none: no pruning."""


@dataclass
class HFGenerateAdapter:
    """Rows from one call of Hugging Face's `generate`, which runs this in place of a decoding loop of its own.

    Hugging Face's `generate` merges configurations and builds processors and criteria; the loop is the engine's.

    Args:
        base: the base.
        pruner: chooses the visual tokens that go on; None: all do.
        schedule: its cuts.
        refocus: τ; None: the kept visual tokens stay the same.
        streamer: the streamer of `generate`.
        generator: what sampling draws from; None: torch's own.
        prefix: prefix cache of a conversation.
        vision: what the vision tower computes, for pruners that rank by it.
        alone: whether its rows decode without those of other calls, so that one row can draw from torch's own generator.
    """

    base: BaseVLM
    pruner: Pruner | None
    schedule: Schedule
    refocus: float | None
    streamer: Any
    generator: torch.Generator | None
    prefix: PrefixCache | None
    vision: ReadVision | None = None
    alone: bool = True
    entered: bool = False
    """Whether Hugging Face's `generate` accepted the arguments."""
    rows: list[Row] = field(default_factory=list)
    config: GenerationConfig = field(default_factory=GenerationConfig)

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch tokens"],
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """Make the rows; the answers come from an engine.

        Raises:
            TwigVLMError: a way to generate that the engine does not know, several answers for a streamer or a conversation, or a
                conversation's prompt with padding.
        """
        self.entered = True
        check_generation(generation_config)
        check_rows(len(input_ids), self.streamer, self.prefix)
        dropped = (compat.CACHE, "use_cache")
        model_kwargs = {
            name: value for name, value in model_kwargs.items() if value is not None and name not in dropped
        }
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            check_mask(mask)  # it may be Hugging Face's own, made from the padding tokens
        padding = [0] * len(input_ids) if mask is None else (mask == 0).sum(dim=1).tolist()
        if self.prefix is not None and any(padding):
            raise TwigVLMError(
                f"attention_mask: hides {padding[0]} tokens; give a conversation's prompt without padding"
            )
        inputs = {"input_ids": input_ids, **model_kwargs}
        if self.prefix is None:
            prompt = self.base.prompt(vision=self.vision, **inputs)
        else:
            prompt = self.prefix.open(self.base, inputs, self.vision)
        self.vision = None  # it holds all that the tower computed
        stopping = split_criteria(stopping_criteria, input_ids, padding)
        noises = _noises(self.base, len(input_ids), generation_config, self.generator, self.alone)
        lanes = None
        if logits_processor:
            lanes = split_processors(logits_processor, input_ids, padding, generation_config, self.base.vocabulary)
        criteria = stopping if stopping.needs_ids else None
        request = Request(input_ids, padding, lanes, criteria, _pad_token(generation_config))
        self.config = generation_config
        visual = prompt.visual_mask.sum(dim=1).tolist()
        schedules = [self.schedule(count) for count in visual]
        # Prompts without visual tokens pass the cuts of the others, so that one prefill takes up the whole batch.
        empty = tuple(Cut(cut.layer, 0) for cut in max(schedules, key=len))
        for index, noise in enumerate(noises):
            cuts = schedules[index] or empty
            request.rows.append(
                Row(
                    request=request,
                    prompt=prompt,
                    index=index,
                    pruner=self.pruner if cuts else None,
                    cuts=cuts,
                    max_new_tokens=stopping.max_new_tokens,
                    eos_token_ids=stopping.eos_token_ids,
                    noise=noise,
                    prefix=self.prefix,
                    emit=_emitter(self.streamer),
                    refocus=self.refocus,
                )
            )
        self.rows = request.rows
        return input_ids


def run_rows(engine: Engine, adapter: HFGenerateAdapter, timings: Timings | None) -> Tensor | TwigOutput:
    """Decode the rows of one call to their ends: what `generate` returns."""
    rows = adapter.rows
    engine.submit(rows)
    for _ in engine.stream():
        pass
    if adapter.streamer is not None:
        adapter.streamer.end()
    request = rows[0].request
    ids = request.padded_ids({})
    if timings is None:
        return ids
    kept = _kept_positions(rows, request.padding) if any(row.cuts for row in rows) else None
    averages = [average_of(row.pruner, row.cuts, row.visual, adapter.base.num_layers) for row in rows]
    looks = None if adapter.refocus is None else _looks(rows, request.padding)
    drafted, accepted = [row.drafted for row in rows], [row.accepted for row in rows]
    return TwigOutput(ids, kept, averages, looks, drafted, accepted, timings)


def with_stop_strings(kwargs: dict[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """Arguments with stop strings as a criterion: `generate` with a custom loop does not pass its tokenizer on.

    What the checkpoint's config says of a cache is passed over, since the engine has its own.

    Args:
        kwargs: arguments of `generate`.
        defaults: the checkpoint's generation config.
    """
    arguments = dict(kwargs)
    if defaults.cache_implementation is not None:
        arguments["cache_implementation"] = None
    if defaults.use_cache is False:
        arguments.setdefault("use_cache", True)
    tokenizer, given = arguments.pop("tokenizer", None), arguments.get("generation_config")
    from_config = None if given is None else given.stop_strings
    strings = defaults.stop_strings if from_config is None else from_config
    if "stop_strings" in arguments or defaults.stop_strings is not None:
        strings = arguments.get("stop_strings", strings)  # None: none, whatever the configs say
        arguments["stop_strings"] = None  # an argument, because a config's None means the checkpoint's default
    if from_config is not None:
        arguments["generation_config"] = copy.deepcopy(given)
        arguments["generation_config"].stop_strings = None
    strings = [strings] if isinstance(strings, str) else strings
    if not strings:
        return arguments
    if not isinstance(strings, Collection) or not all(isinstance(each, str) for each in strings):
        raise TwigVLMError(f"stop_strings={strings!r}: must be a list of texts")
    if tokenizer is None:
        raise TwigVLMError("stop_strings: needs the tokenizer too; pass tokenizer=processor.tokenizer")
    if not hasattr(tokenizer, "get_vocab"):
        raise TwigVLMError(f"tokenizer: is {type(tokenizer).__name__}; pass tokenizer=processor.tokenizer")
    criteria = StoppingCriteriaList(arguments.pop("stopping_criteria", None) or [])
    criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    return {**arguments, "stopping_criteria": criteria}


def _pad_token(config: GenerationConfig) -> int:
    """What follows a shorter answer, as in the base's own `generate`: the first end token, if no padding is named."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id  # one, several in a list, a tuple or a tensor, or none
    return 0 if ends is None else int(torch.as_tensor(ends).flatten()[0])


def _emitter(streamer: Any) -> Callable[[int], None] | None:
    """Takes each new token of the answer."""
    if streamer is None:
        return None
    return lambda token: streamer.put(torch.tensor([token]))


def _kept_positions(rows: Sequence[Row], padding: Sequence[int]) -> list[Tensor]:
    """Where the kept visual tokens stand in the prompts as they were given, so much padding included."""
    found = []
    for row, count in zip(rows, padding, strict=True):
        mask = row.prompt.visual_mask[row.index] if row.kept is None else row.kept
        if row.cuts and not row.cuts[0].keep:
            mask = torch.zeros_like(mask)  # nobody was asked who stays
        found.append(mask.nonzero()[:, 0].clone() + count)
    return found


def _looks(rows: Sequence[Row], padding: Sequence[int]) -> list[list[Look]]:
    """Looks with positions as in the prompts as they were given."""
    pairs = zip(rows, padding, strict=True)
    return [[look._replace(kept=look.kept + count) for look in row.looks] for row, count in pairs]


def _noises(
    base: BaseVLM, rows: int, config: GenerationConfig, generator: torch.Generator | None, alone: bool
) -> Sequence[Noise | None]:
    """What each row samples with.

    Args:
        base: the base.
        rows: number of rows.
        config: configuration of `generate`; says whether to sample.
        generator: what sampling draws from; None: torch's own.
        alone: whether no other call draws meanwhile.
    """
    if not config.do_sample:
        if generator is not None:
            raise TwigVLMError("generator: has no effect on greedy decoding; leave it out, or pass do_sample=True")
        return [None] * rows
    device = base.device
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TwigVLMError(f"generator={generator!r}: is no random generator; pass torch.Generator(device)")
    if generator is not None and generator.device.type != device.type and rows == 1:
        raise TwigVLMError(
            f"generator: is on {str(generator.device)!r}, the base on {str(device)!r}; create it with torch.Generator(device)"
        )
    draws_from_it = rows == 1 and (alone or generator is not None)
    streams = [generator] if draws_from_it else _streams(rows, device, generator)
    temperature = 1.0 if config.temperature is None else config.temperature
    return [Noise(temperature, base.vocabulary, device, stream) for stream in streams]


def _streams(rows: int, device: torch.device, generator: torch.Generator | None) -> list[torch.Generator | None]:
    """A random stream for each row, so that none depends on how far the others are."""
    where = device if generator is None else generator.device
    seeds = torch.randint(2**62, (rows,), generator=generator, device=where).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]
