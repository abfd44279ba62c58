"""Conversations: several questions, about pictures that come with any of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from twigvlm.inputs import special_tokens
from twigvlm.kv.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from twigvlm.model import TwigVLM


class Conversation:
    """A conversation with a TwigVLM; `TwigVLM.chat` begins one.

    Each answer is the one that the whole conversation as one prompt would get. TrunkOutput and twig keep what they computed, and
    vision runs again only when a picture comes; visual tokens are chosen anew for each question.

    Args:
        model: the model.
        processor: its base's; turns messages into inputs by its chat template.
        options: of `TwigVLM.generate`, for every question.
    """

    def __init__(self, model: "TwigVLM", processor: Any, options: dict[str, Any]) -> None:
        self.messages: list[dict[str, Any]] = []
        """All turns so far, as chat templates take them."""
        self._model, self._processor, self._options = model, processor, options
        self._images: list[Any] = []
        self._memory = PrefixCache()

    def ask(self, question: str, images: Sequence[Any] = (), **options: Any) -> str:
        """The answer to a question, which becomes part of the conversation with it.

        Args:
            question: text.
            images: pictures that come with it, before the text: whatever the processor takes as one.
            options: of `TwigVLM.generate`, for this question, beside or instead of the conversation's.

        Raises:
            TwigVLMError: as `generate`; the conversation stays as it was.
        """
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        messages, pictures = [*self.messages, {"role": "user", "content": content}], [*self._images, *images]
        tokenizer = self._processor.tokenizer
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = self._processor(
            images=pictures or None, text=text, return_tensors="pt", **special_tokens(text, tokenizer)
        )
        inputs = inputs.to(self._model.base.device, self._model.base.dtype)
        options = {**self._options, **options, "return_dict_in_generate": True}
        output: Any = self._model.generate(**inputs, **options, memory=self._memory)
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        answer = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self._images = pictures
        return answer
