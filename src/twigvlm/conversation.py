"""Conversations: several questions, each with or without new pictures."""

from collections.abc import Callable, Sequence
from typing import Any

from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.images import Picture
from twigvlm.inputs import build_inputs, user_turn
from twigvlm.kv.prefix_cache import PrefixCache


class Conversation:
    """A conversation with a TwigVLM; `TwigVLM.chat` starts one.

    In float32, each answer equals the answer to the whole conversation as a single prompt. Trunk and twig run only on what is new
    in the prompt, and vision only on new pictures. Visual tokens are chosen again for each question.

    Args:
        base: the model's base.
        generate: the model's `TwigVLM.generate`.
        processor: the base's processor, whose chat template turns messages into inputs.
        options: arguments of `TwigVLM.generate` for every question.

    Raises:
        TwigVLMError: `processor` is something else, for example only a tokenizer.
    """

    def __init__(self, base: BaseVLM, generate: Callable[..., Any], processor: Any, options: dict[str, Any]) -> None:
        if not hasattr(processor, "tokenizer"):
            raise TwigVLMError(
                f"processor: is {type(processor).__name__}; pass the base's processor, not its tokenizer"
            )
        self.messages: list[dict[str, Any]] = []
        """All turns so far, in the format of chat templates; parts of type `image` hold a PIL image."""
        self._base, self._generate, self._processor, self._options = base, generate, processor, options
        self._prefix = PrefixCache()

    def ask(self, question: str, images: Picture | Sequence[Picture] = (), **options: Any) -> str:
        """Ask a question and return its answer; both become part of the conversation.

        Args:
            question: text of the question.
            images: one picture or several that precede the text: paths, data URIs, bytes of files, PIL images, or 8-bit
                arrays [height, width, 3]; see `twigvlm.images.load_image`.
            options: arguments of `TwigVLM.generate` for this question; they take precedence over the conversation's.

        Raises:
            TwigVLMError: an error of `generate`, a question that is no text, a picture that cannot be read, messages that the
                processor or its chat template rejects, or an option that the conversation passes itself: the prompt's ids,
                pixels and masks, and `memory`. The conversation stays as it was.
        """
        if not isinstance(question, str):
            raise TwigVLMError(f"question: is {type(question).__name__}; ask a text")
        messages = [*self.messages, user_turn(question, images)]
        base = self._base
        inputs = build_inputs(self._processor, [messages], base.device, base.dtype)
        options = {**self._options, **options, "return_dict_in_generate": True}
        if taken := options.keys() & {*inputs, "memory"}:
            raise TwigVLMError(f"{', '.join(sorted(taken))}: a conversation passes its own; leave this out")
        output = self._generate(**inputs, **options, memory=self._prefix)
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        answer = str(self._processor.tokenizer.decode(new, skip_special_tokens=True)).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer
