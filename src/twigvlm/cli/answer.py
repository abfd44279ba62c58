"""Ask a loaded base or its twig one question, and measure the answer; shared by `generate`, `demo` and `inspect`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from twigvlm.base.checks import has_mrope
from twigvlm.cli.session import Session
from twigvlm.config import SamplingConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.speed import FirstToken, attention_of
from twigvlm.inputs import Message, build_inputs
from twigvlm.pruning.refocus import Look
from twigvlm.timing import clock_of
from twigvlm.visualize import patch_grid


@dataclasses.dataclass(frozen=True)
class KeptAgain:
    """A later choice of the kept visual tokens."""

    after: int
    """Number of new tokens before this choice."""
    ran: int
    """Number of tokens that were not kept before, and so ran through the pruned layers again."""
    kept_indices: list[int]
    """Indices of the kept tokens among the visual tokens."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer with its times and counts. Times are in milliseconds; the number of tokens includes the end token."""

    text: str
    token_ids: list[int]
    num_tokens: int
    prefill_ms: float
    decode_ms: float
    draft_ms: float | None
    verify_ms: float | None
    visual_tokens: int
    grid: tuple[int, int] | None
    """Rows and columns of the visual tokens if they are the patches of one whole image, else None."""
    kept_tokens: int
    kept_indices: list[int] | None
    """Indices, among the visual tokens, of those that the first cut kept; None without pruning."""
    average_visual: float | None
    """R̄: average number of visual tokens over all layers; None without pruning."""
    looks: list[KeptAgain] | None
    """Later choices of the kept tokens; None without `refocus`."""
    drafted_lengths: list[int] | None
    accepted_lengths: list[int] | None

    @property
    def seconds(self) -> float:
        """Seconds of prefill and decoding together."""
        return (self.prefill_ms + self.decode_ms) / 1000

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens divided by the seconds of prefill and decoding together."""
        return self.num_tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """The answer as a JSON object."""
        values = dataclasses.asdict(self)
        times = {name: round(values[name], 3) for name in values if name.endswith("_ms") and values[name] is not None}
        return {**values, **times, "tokens_per_second": round(self.tokens_per_second, 3)}


class _TokenCounter(BaseStreamer):
    """A streamer that reports each new token.

    Args:
        token: called for each new token.
    """

    def __init__(self, token: Callable[[], None]) -> None:
        self._token, self._prompt_seen = token, False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt in the first call, and new tokens in each further one."""
        if self._prompt_seen:
            for _ in range(value.numel()):
                self._token()
        self._prompt_seen = True

    def end(self) -> None:
        """End the answer."""


def check_request(prompt: str, max_new_tokens: int) -> None:
    """Raise TwigVLMError for a prompt or length that no model could answer, before a model is loaded."""
    if not prompt.strip():
        raise TwigVLMError(f"prompt {prompt!r}: is empty; write a question about the image")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TwigVLMError(f"prompt {prompt!r}: is not valid UTF-8; write it again") from None
    if max_new_tokens < 1:
        raise TwigVLMError(f"max_new_tokens={max_new_tokens}: must be 1 or more")


def _watcher(tokenizer: Any, stream: bool, on_token: Callable[[], None] | None) -> BaseStreamer | None:
    if stream:
        return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return None if on_token is None else _TokenCounter(on_token)


def answer_question(
    session: Session,
    question: Message,
    max_new_tokens: int,
    *,
    accelerated: bool,
    stream: bool = False,
    on_token: Callable[[], None] | None = None,
    attention: str | None = None,
    sampling: SamplingConfig | None = None,
    processor_options: dict[str, Any] | None = None,
) -> Answer:
    """Answer through the twig as the session's config says, or with the base's own `generate`.

    Args:
        session: the loaded base and twig.
        question: from `user_turn`.
        max_new_tokens: longest answer, in tokens.
        accelerated: whether `TwigVLM.generate` answers, not the base's own.
        stream: whether the answer is printed on stdout while it is generated.
        on_token: called for each new token if the answer is not streamed.
        attention: attention implementation of the base; None: as it was loaded.
        sampling: how tokens are chosen; None: greedily.
        processor_options: options of the processor, for example `num_frames` of a video.

    Raises:
        TwigVLMError: the question cannot be asked, or does not fit into the context.
    """
    sampling = sampling or SamplingConfig()
    base = session.base
    inputs = build_inputs(session.processor, [[question]], base.device, base.dtype, **(processor_options or {}))
    length = inputs["input_ids"].shape[1]
    _check_context(base, length, max_new_tokens)
    clock = clock_of(base.device)
    watch = FirstToken(clock, _watcher(session.processor.tokenizer, stream, on_token))
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        **sampling.generate_options(),
        "num_beams": 1,  # whatever the checkpoint's generation config says
        "streamer": watch,
        "return_dict_in_generate": True,
    }
    generate: Callable[..., Any] = base.generate
    if accelerated:
        assert session.model is not None
        generate = session.model.generate
        options |= session.config.generate_options
    with (
        attention_of(base, attention),
        torch.random.fork_rng([base.device] if base.device.type == "cuda" else []),
    ):
        torch.manual_seed(sampling.seed or 0)
        start = clock()
        output: Any = generate(**inputs, **options)
        end = clock()
    first = end if watch.at is None else watch.at
    return _answer_of(session, inputs, output, accelerated, (start, first, end))


def _answer_of(
    session: Session, inputs: dict[str, Any], output: Any, accelerated: bool, times: tuple[float, float, float]
) -> Answer:
    """Decode the output of `generate`, and count its tokens.

    Args:
        session: the loaded base and twig.
        inputs: inputs of the prompt.
        output: a TwigOutput if accelerated, otherwise Hugging Face's output.
        accelerated: whether `TwigVLM.generate` answered.
        times: times of the start, the first token and the end, in seconds.
    """
    start, first, end = times
    prompt = inputs["input_ids"]
    tokens = output.sequences[0, prompt.shape[1] :].tolist()
    visual = _visual_positions(session.base.config, prompt[0].tolist())
    kept = None if not accelerated or output.kept_indices is None else output.kept_indices[0].tolist()
    looks = output.looks[0] if accelerated and output.looks is not None else None
    timings = output.timings if accelerated else None
    return Answer(
        text=session.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        token_ids=tokens,
        num_tokens=len(tokens),
        prefill_ms=1000 * (first - start),
        decode_ms=1000 * (end - first),
        draft_ms=None if timings is None else 1000 * timings.draft,
        verify_ms=None if timings is None else 1000 * timings.verify,
        visual_tokens=len(visual),
        grid=patch_grid(session.base, len(visual), inputs),
        kept_tokens=len(visual if kept is None else kept),
        kept_indices=None if kept is None else [visual[position] for position in kept],
        average_visual=None if kept is None else output.average_visual[0],
        looks=looks and [_kept_again(look, visual) for look in looks],
        drafted_lengths=output.drafted_lengths[0] if accelerated else None,
        accepted_lengths=output.accepted_lengths[0] if accelerated else None,
    )


def _kept_again(look: Look, visual: dict[int, int]) -> KeptAgain:
    return KeptAgain(look.after, look.ran, [visual[position] for position in look.kept.tolist()])


def _visual_positions(config: Any, ids: list[int]) -> dict[int, int]:
    """Position of each visual token in a prompt -> its index among the visual tokens."""
    placeholders = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
    positions = (position for position, token in enumerate(ids) if token in placeholders)
    return {position: index for index, position in enumerate(positions)}


def _check_context(base: Any, length: int, max_new_tokens: int) -> None:
    config = base.config.get_text_config()
    limit = None if has_mrope(config) else getattr(config, "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        raise TwigVLMError(
            f"prompt of {length} tokens with max_new_tokens={max_new_tokens}: longer than the model's context of {limit}; "
            "shorten the prompt or lower max_new_tokens"
        )
