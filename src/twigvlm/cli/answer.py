"""One question to a loaded base or its twig, and what the answer cost: what `generate`, `demo` and `inspect` share."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from twigvlm.cli.session import Session, build_inputs
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.speed import FirstToken, attention_of
from twigvlm.timing import clock_of

GREEDY = {"do_sample": False}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer and what it cost. Times are in milliseconds; the count of tokens includes the end token."""

    text: str
    token_ids: list[int]
    num_tokens: int
    prefill_ms: float
    decode_ms: float
    draft_ms: float | None
    verify_ms: float | None
    visual_tokens: int
    kept_tokens: int
    kept_indices: list[int] | None
    """Which visual tokens were kept after layer K, counted from the first one; None without pruning."""
    drafted_lengths: list[int] | None
    accepted_lengths: list[int] | None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time, prefill and decoding."""
        return 1000 * self.num_tokens / (self.prefill_ms + self.decode_ms)

    def report(self) -> dict[str, Any]:
        """The answer as a JSON object."""
        values = dataclasses.asdict(self)
        times = {name: round(values[name], 3) for name in values if name.endswith("_ms") and values[name] is not None}
        return {**values, **times, "tokens_per_second": round(self.tokens_per_second, 3)}


def check_request(prompt: str, max_new_tokens: int) -> None:
    """Refuse what no model could answer, before any is loaded."""
    if not prompt.strip():
        raise TwigVLMError(f"prompt {prompt!r}: is empty; write a question about the image")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise TwigVLMError(f"prompt {prompt!r}: is no text in UTF-8; write it anew") from None
    if max_new_tokens < 1:
        raise TwigVLMError(f"max_new_tokens={max_new_tokens}: must be 1 or more")


def sampling_options(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """Of `generate`; greedy without a temperature. The seed is checked only: `ask` sets it."""
    if temperature is None:
        for name, value in (("top_p", top_p), ("seed", seed)):
            if value is not None:
                raise TwigVLMError(f"{name}={value:g}: needs a temperature; add --temperature 1, or leave it out")
        return GREEDY
    if seed is not None and not 0 <= seed < 2**63:
        raise TwigVLMError(f"seed={seed}: must be 0 or more, and less than 2^63")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise TwigVLMError(
            f"temperature={temperature:g}: must be more than 0; leave it out for the most probable tokens"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise TwigVLMError(f"top_p={top_p:g}: must be more than 0, and at most 1")
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0 if top_p is None else top_p}


def ask(
    session: Session,
    image: Image.Image,
    prompt: str,
    max_new_tokens: int,
    *,
    accelerated: bool,
    stream: bool = False,
    attention: str | None = None,
    sampling: Mapping[str, Any] = GREEDY,
    seed: int = 0,
) -> Answer:
    """Answer through the twig as the plan says, or with the base's own `generate`.

    `attention` is the implementation that the base attends by (None: as it was loaded), `sampling` from `sampling_options`.
    """
    inputs = build_inputs(session.base, session.processor, [image], [prompt])
    length = inputs["input_ids"].shape[1]
    _check_context(session.base, length, max_new_tokens)
    tokenizer = session.processor.tokenizer
    clock = clock_of(session.base.device)
    watch = FirstToken(clock, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        **sampling,
        "streamer": watch,
        "return_dict_in_generate": True,
    }
    generate: Callable[..., Any] = session.base.generate
    if accelerated:
        assert session.model is not None
        generate = session.model.generate
        options |= {"retain": session.plan.retain, "speculate": session.plan.speculate}
        if session.plan.speculate == "auto":
            session.model.costs()  # measured once for all answers, of which none is this one's time
    place = session.base.device
    with attention_of(session.base, attention), torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        began = clock()
        output: Any = generate(**inputs, **options)
        ended = clock()
    first = ended if watch.at is None else watch.at
    tokens = output.sequences[0, length:].tolist()
    positions = (inputs["input_ids"][0] == session.base.config.image_token_id).nonzero().flatten().tolist()
    kept = None if not accelerated or output.kept_indices is None else output.kept_indices[0].tolist()
    timings = output.timings if accelerated else None
    return Answer(
        text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        token_ids=tokens,
        num_tokens=len(tokens),
        prefill_ms=1000 * (first - began),
        decode_ms=1000 * (ended - first),
        draft_ms=None if timings is None else 1000 * timings.draft,
        verify_ms=None if timings is None else 1000 * timings.verify,
        visual_tokens=len(positions),
        kept_tokens=len(positions if kept is None else kept),
        kept_indices=None if kept is None else [positions.index(position) for position in kept],
        drafted_lengths=output.drafted_lengths[0] if accelerated else None,
        accepted_lengths=output.accepted_lengths[0] if accelerated else None,
    )


def _check_context(base: Any, length: int, max_new_tokens: int) -> None:
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + max_new_tokens > limit:
        raise TwigVLMError(
            f"prompt of {length} tokens with max_new_tokens={max_new_tokens}: longer than the model's context of {limit}; "
            "shorten the prompt or lower max_new_tokens"
        )
