"""Answers that follow a JSON schema: a logits processor based on the optional grammar library llguidance."""

import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from twigvlm.serving.errors import RequestError
from twigvlm.serving.trial import TooMuchWork, try_schema

_log = logging.getLogger(__name__)
_LONGEST = 300  # characters of the library's messages, some of which hold the whole schema


class Grammars:
    """Compiles JSON schemas for one model.

    Args:
        tokenizer: the base's fast tokenizer.
        vocabulary: number of logits of the base.
        eos: token ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Sequence[int]) -> None:
        self._hf_tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)
        self.tokenizer: Any = None
        """The tokenizer in llguidance's form; made when it is first needed."""

    def check(self, schema: dict[str, Any]) -> None:
        """Check that a JSON schema compiles within limits of time and memory. Refusing one that does not takes seconds.

        Raises:
            RequestError: llguidance is not installed, or the schema takes too much work.
        """
        if find_spec("llguidance") is None:
            raise RequestError(
                "response_format: this server has no grammar library; install it by: pip install 'twigvlm[serve]'",
                param="response_format",
            )
        try:
            try_schema(_with_options(schema))
        except TooMuchWork:
            raise _too_much_work() from None

    def compile(self, schema: dict[str, Any]) -> "Grammar":
        """Compile a JSON schema.

        Raises:
            RequestError: llguidance is not installed or refuses the schema, or the schema takes too much work.
        """
        self.check(schema)
        import llguidance
        import llguidance.hf

        text = _with_options(schema)
        try:
            if self.tokenizer is None:
                self.tokenizer = llguidance.hf.from_tokenizer(self._hf_tokenizer, self._vocabulary, self._eos)
            matcher = llguidance.LLMatcher(
                self.tokenizer, llguidance.LLMatcher.grammar_from_json_schema(text), log_level=0
            )
            reason = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:  # also of tokenizers that it does not know
            reason = str(error)
        if reason:
            reason = "an internal error" if "panic" in reason else _line(reason)
            raise RequestError(f"response_format: the grammar library refuses it ({reason})", param="response_format")
        return Grammar(matcher, self._vocabulary, self._eos)


class Grammar:
    """A compiled schema; makes a processor for each answer.

    Args:
        matcher: llguidance's matcher at the start of an answer.
        vocabulary: number of logits of the base.
        eos: token ids that end an answer.
    """

    def __init__(self, matcher: Any, vocabulary: int, eos: Sequence[int]) -> None:
        self._matcher, self._vocabulary, self._eos = matcher, vocabulary, eos

    def processor(self, prompt: int) -> "GrammarProcessor":
        """A logits processor for one answer.

        Args:
            prompt: number of tokens of its prompt.
        """
        return GrammarProcessor(self._matcher.deep_copy(), prompt, self._vocabulary, self._eos)


class GrammarProcessor(LogitsProcessor):
    """Rules out all tokens that the grammar does not allow next. It must be called once for each position, in order.

    Args:
        matcher: llguidance's matcher of this answer.
        prompt: number of tokens of the prompt.
        vocabulary: number of logits.
        eos: token ids that end an answer.
    """

    def __init__(self, matcher: Any, prompt: int, vocabulary: int, eos: Sequence[int]) -> None:
        self._matcher, self._seen, self._vocabulary, self._eos = matcher, prompt, vocabulary, list(eos)
        self.error: RequestError | None = None
        """Why the grammar failed. It is not raised, because that would fail the step of all rows in the batch."""

    def __call__(
        self, input_ids: Int[Tensor, "1 tokens"], scores: Float[Tensor, "1 vocabulary"]
    ) -> Float[Tensor, "1 vocabulary"]:
        """The scores, with −∞ for tokens that are not allowed; after an error only end tokens are allowed."""
        if self.error is not None:
            return self._only_end(scores)
        for token in input_ids[0, self._seen :].tolist():
            self._matcher.consume_token(token)
        self._seen = input_ids.shape[1]
        words = torch.zeros((self._vocabulary + 31) // 32, dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.element_size())
        if self._matcher.is_error():
            _log.warning("a grammar failed: %s", _line(self._matcher.get_error()))
            self.error = _too_much_work()
            return self._only_end(scores)
        bits = (words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        allowed = bits.flatten()[: scores.shape[1]].bool().to(scores.device)
        return scores.masked_fill(~allowed, float("-inf"))

    def _only_end(self, scores: Float[Tensor, "1 vocabulary"]) -> Float[Tensor, "1 vocabulary"]:
        if not self._eos:
            return scores
        ended = torch.full_like(scores, float("-inf"))
        ended[:, self._eos] = 0
        return ended


def _with_options(schema: dict[str, Any]) -> str:
    # Without this a model may fill the whole answer with spaces, which JSON allows between all tokens.
    return json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}})


def _too_much_work() -> RequestError:
    return RequestError("response_format: this schema takes too much work; simplify it", param="response_format")


def _line(message: str) -> str:
    """A message of the library on one line, shortened if it is too long."""
    line = " ".join(message.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
