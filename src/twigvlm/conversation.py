"""Conversations: several questions, about pictures that come with any of them."""

from collections.abc import Callable, Sequence
from typing import Any

from twigvlm.base.vlm import BaseVLM
from twigvlm.images import Picture
from twigvlm.inputs import build_inputs, user_turn
from twigvlm.kv.prefix_cache import PrefixCache


class Conversation:
    """A conversation with a TwigVLM; `TwigVLM.chat` begins one.

    Each answer is the one that the whole conversation as one prompt would get. The trunk and the twig keep what they
    computed, and vision runs again only when a picture comes; visual tokens are chosen again for each question.

    Args:
        base: its base.
        generate: its `TwigVLM.generate`.
        processor: the base's; turns messages into inputs by its chat template.
        options: of `TwigVLM.generate`, for every question.
    """

    def __init__(self, base: BaseVLM, generate: Callable[..., Any], processor: Any, options: dict[str, Any]) -> None:
        self.messages: list[dict[str, Any]] = []
        """All turns so far, as chat templates take them; parts of type `image` hold their picture, a PIL image."""
        self._base, self._generate, self._processor, self._options = base, generate, processor, options
        self._prefix = PrefixCache()

    def ask(self, question: str, images: Picture | Sequence[Picture] = (), **options: Any) -> str:
        """The answer to a question, which becomes part of the conversation with it.

        Args:
            question: text.
            images: one picture or several that come with it, before the text: paths, data URIs, bytes of files, PIL images
                or 8-bit arrays [height, width, 3], read as `twigvlm.images.load_image` says.
            options: of `TwigVLM.generate`, for this question, beside or instead of the conversation's.

        Raises:
            TwigVLMError: as `generate`, or a picture cannot be read, or the processor or its chat template refuses; the
                conversation stays as it was.
        """
        messages = [*self.messages, user_turn(question, images)]
        base = self._base
        inputs = build_inputs(self._processor, [messages], base.device, base.dtype)
        options = {**self._options, **options, "return_dict_in_generate": True}
        output = self._generate(**inputs, **options, memory=self._prefix)
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        answer = str(self._processor.tokenizer.decode(new, skip_special_tokens=True)).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer
