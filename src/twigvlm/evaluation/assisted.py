"""Speculation by transformers' own `generate` ("assisted generation"): count its drafts, and work around its faults."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from twigvlm import compat
from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError, is_refusal, one_line


@dataclass
class AssistedSteps(BaseStreamer):
    """Counts the drafted and the accepted tokens of each step, as `TwigOutput` does, while one answer is generated.

    Transformers returns neither number. Drafted tokens are counted in the inputs of the base's passes, and new tokens in what is
    streamed. Nothing is read from the device before the answer is complete.

    Args:
        then: streamer to which everything is passed on; None: there is none.
    """

    then: BaseStreamer
    _passes: list[Tensor] = field(default_factory=list)
    _streamed: list[Tensor] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Take the prompt in the first call, and the new tokens of a step in each further one."""
        self._streamed.append(value)
        self.then.put(value)

    def end(self) -> None:
        """End the answer."""
        self.then.end()

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Note the inputs of the base's passes while the block runs. The model is not changed."""

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self._passes.append(kwargs["input_ids"])

        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def counts(self) -> tuple[list[int], list[int]]:
        """Drafted and accepted tokens of each step, the prefill first."""
        drafted, accepted = [], []
        known = self._streamed[0].numel()
        for ids, new in zip(self._passes, self._streamed[1:], strict=True):
            draft, tokens = ids[0, known:].tolist(), new.flatten().tolist()
            agreeing = [ours == theirs for ours, theirs in zip(draft, tokens, strict=False)]
            drafted.append(len(draft))
            accepted.append(agreeing.index(False) if False in agreeing else len(agreeing))
            known = 1  # of the tokens of a later pass, only the newest one is no draft
        return drafted, accepted


def prompt_lookup(draft_length: int, lookup_ngram: int) -> dict[str, int]:
    """Options of `generate` for prompt lookup: draft up to δ tokens that followed an earlier occurrence of the last n tokens."""
    return {"prompt_lookup_num_tokens": draft_length, "max_matching_ngram_size": lookup_ngram}


@contextmanager
def assisted_generation(
    base: BaseVLM, inputs: dict[str, Any], assistant: Any, steps: AssistedSteps, setting: str
) -> Iterator[dict[str, Any]]:
    """While the block runs, the base's own `generate` can speculate on one prompt, with its faults worked around and its drafts
    counted.

    Args:
        base: the base that answers.
        inputs: inputs of the prompt.
        assistant: Hugging Face model that drafts; None: prompt lookup drafts, with the options of `prompt_lookup`.
        steps: streamer of `generate`, which counts.
        setting: name of this way to draft in error messages.

    Yields:
        Further options of `generate`.

    Raises:
        TwigVLMError: transformers refuses to speculate on this base.
    """
    pictures = nullcontext() if assistant is None else shown_pictures(assistant, inputs)
    with refusals_of(setting), steps.watching(base.model), pictures:
        yield without_placeholders(base) if assistant is None else {"assistant_model": assistant}


@contextmanager
def shown_pictures(assistant: Any, inputs: dict[str, Any]) -> Iterator[None]:
    """While the block runs, an assistant sees the pictures of the prompt in its first pass.

    Transformers (5.23) withholds them: it only passes inputs other than text on with the first pass, and takes no pass of an
    assistant for the first, so that an assistant would draft without having seen the pictures.

    Args:
        assistant: a Hugging Face model.
        inputs: inputs of the prompt.
    """

    def show(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = kwargs.get(compat.CACHE)
        if cache is not None and cache.get_seq_length():
            return args, kwargs
        return args, {**{name: value for name, value in inputs.items() if name != "attention_mask"}, **kwargs}

    hook = assistant.register_forward_pre_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def without_placeholders(base: BaseVLM) -> dict[str, list[int]]:
    """Options of `generate` with which transformers' prompt lookup drafts no placeholders of visual tokens.

    It would draft them if the end of the prompt also occurs before an image ("USER:"). With transformers 5.23 the base then
    fails, because it gets more placeholders than features.
    """
    return {"suppress_tokens": [getattr(base.model.config, visual.placeholder) for visual in base.family.visuals]}


@contextmanager
def refusals_of(setting: str) -> Iterator[None]:
    """Turn errors of transformers' assisted generation, which fails in many ways, into a TwigVLMError of one line."""
    try:
        yield
    except Exception as error:
        if not (is_refusal(error) or isinstance(error, AttributeError | KeyError | TypeError)):
            raise
        raise TwigVLMError(
            f"{setting}: transformers' generate cannot run it on this base ({one_line(error)}); leave it out"
        ) from error


def check_assistant(base: BaseVLM, assistant: Any, name: str) -> None:
    """Refuse an assistant whose drafts could not be used.

    Args:
        base: the base, which verifies the drafts.
        assistant: a Hugging Face model.
        name: name of the assistant in error messages.

    Raises:
        TwigVLMError: the assistant has another vocabulary, or other placeholders of visual tokens.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (assistant, base.model)]
    if sizes[0] != sizes[1]:
        raise TwigVLMError(
            f"assistant {name!r}: has a vocabulary of {sizes[0]:,} tokens, the base one of {sizes[1]:,}; choose a smaller model "
            "of the base's own family"
        )
    for visual in base.family.visuals:
        tokens = [getattr(model.config, visual.placeholder, None) for model in (assistant, base.model)]
        if tokens[0] != tokens[1]:
            raise TwigVLMError(
                f"assistant {name!r}: its {visual.placeholder} is {tokens[0]}, the base's {tokens[1]}; choose a smaller "
                "vision-language model of the base's own family"
            )
