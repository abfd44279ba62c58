"""Speculation by transformers' own `generate` ("assisted generation"): what it drafts, and which models may draft for it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from twigvlm import compat
from twigvlm.base.vlm import BaseVLM, is_refusal
from twigvlm.errors import TwigVLMError, one_line


@dataclass
class AssistedSteps(BaseStreamer):
    """Counts the drafted and the accepted tokens of each step, as `TwigOutput` does, while one answer is generated.

    Transformers returns neither number. What is drafted is seen in the inputs of the base's passes, what a step brings in
    what it streams. Nothing is read from the device before the answer is complete.

    Args:
        then: streamer that gets what this one gets.
    """

    then: BaseStreamer
    _passes: list[Tensor] = field(default_factory=list)
    _streamed: list[Tensor] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """The first call brings the prompt, each further one the new tokens of a step."""
        self._streamed.append(value)
        self.then.put(value)

    def end(self) -> None:
        """The answer is complete."""
        self.then.end()

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Inside, the inputs of the base's passes are noted; the model is not changed."""

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
    """Options of `generate` with which it drafts up to δ tokens that followed the newest n, or fewer, before."""
    return {"prompt_lookup_num_tokens": draft_length, "max_matching_ngram_size": lookup_ngram}


@contextmanager
def assisted_generation(
    base: BaseVLM, inputs: dict[str, Any], assistant: Any, steps: AssistedSteps, setting: str
) -> Iterator[dict[str, Any]]:
    """Inside, the base's own `generate` may speculate on one prompt: its faults are worked around, and its drafts counted.

    Args:
        base: answers.
        inputs: inputs of the prompt.
        assistant: Hugging Face model that drafts; None: prompt lookup does, by the options of `prompt_lookup`.
        steps: the streamer of `generate`; counts.
        setting: what errors call this way to draft.

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
    """Inside, an assistant sees the pictures of a prompt when it begins with it.

    Transformers (5.23) withholds them: it takes no pass of an assistant for the first one, and passes on what is not text with
    the first one alone, so that an assistant would draft blindly.

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

    It would where the end of a prompt stands before an image too ("USER:"), and after a prompt (transformers 5.23) the base
    then fails, since it gets more placeholders than features.
    """
    return {"suppress_tokens": [getattr(base.model.config, visual.placeholder) for visual in base.family.visuals]}


@contextmanager
def refusals_of(setting: str) -> Iterator[None]:
    """Inside, what transformers' `generate` refuses is one line; its assisted generation fails in many ways."""
    try:
        yield
    except Exception as error:
        if not (is_refusal(error) or isinstance(error, AttributeError | KeyError | TypeError)):
            raise
        raise TwigVLMError(
            f"{setting}: transformers' generate cannot run it on this base ({one_line(error)}); leave it out"
        ) from error


def check_assistant(base: BaseVLM, assistant: Any, name: str) -> None:
    """Refuse a model whose drafts would be of no use.

    Args:
        base: drafts are verified by it.
        assistant: a Hugging Face model.
        name: name of the assistant.

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
