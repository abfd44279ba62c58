"""Answers in the format of OpenAI's chat completions, whole or in chunks."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from twigvlm.serving.jobs import Counts, Job, Tokens
from twigvlm.serving.text import AnswerText, Piece


@dataclass
class _Answer:
    """One choice of a completion."""

    text: AnswerText
    pieces: list[Piece] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    counts: Counts = field(default_factory=lambda: Counts(0, 0, 0, 0.0, 0))
    finished: bool = False

    @property
    def finish_reason(self) -> str:
        """Why the answer ended: "stop" or "length"."""
        return "stop" if self.text.stopped else "length"


class Completion:
    """Collects the events of one request into a completion, or into the chunks of a stream.

    Args:
        model: name of the model in the response.
        job: the job of the request.
        text: makes an `AnswerText` for each answer.
        give_up: called with the index of an answer that a stop text has ended.
        streamed: whether the client gets chunks, so that the kept visual tokens need not be collected.
    """

    def __init__(
        self,
        model: str,
        job: Job,
        text: Callable[[], AnswerText],
        give_up: Callable[[int], None],
        streamed: bool = False,
    ) -> None:
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._model, self._give_up, self._streamed = model, give_up, streamed
        self._prompt_tokens, self._details, self._grid = job.prompt_tokens, job.details, job.grid
        self._answers = [_Answer(text()) for _ in job.choices]
        self._begun: set[int] = set()

    @property
    def finished(self) -> bool:
        """Whether all answers are complete."""
        return all(answer.finished for answer in self._answers)

    def take(self, event: Tokens) -> list[dict[str, Any]]:
        """Add an event, and return the chunks that report it in a stream."""
        answer = self._answers[event.choice]
        if answer.finished:  # tokens that came while a stop text was found
            return []
        new = answer.text.push(event.tokens, event.finished)
        answer.pieces += new
        answer.counts = event.counts
        if event.kept is not None and not self._streamed:
            answer.kept.append(event.kept)
        if answer.text.cut and not event.finished:
            self._give_up(event.choice)
        answer.finished = event.finished or answer.text.cut
        return self._chunks(event.choice, answer, new, event.kept)

    def _chunks(self, index: int, answer: _Answer, new: list[Piece], kept: list[int] | None) -> list[dict[str, Any]]:
        found = []
        first = index not in self._begun
        if first or new or kept is not None:
            self._begun.add(index)
            delta = {**({"role": "assistant"} if first else {}), "content": _join(new)}
            extra = {"pieces": _as_json(new), **({} if kept is None else {"kept": kept, "grid": self._grid})}
            found.append(self._chunk(index, delta, None, extra))
        if answer.finished:
            found.append(self._chunk(index, {}, answer.finish_reason, {}))
        return found

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None, details: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        if self._details and details:
            choice["twigvlm"] = details
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose request set `include_usage`."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def as_json(self) -> dict[str, Any]:
        """The whole completion."""
        choices = []
        for index, answer in enumerate(self._answers):
            message = {"role": "assistant", "content": _join(answer.pieces), "refusal": None}
            choice = {"index": index, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
            if self._details:
                choice["twigvlm"] = {"pieces": _as_json(answer.pieces), "kept": answer.kept, "grid": self._grid}
            choices.append(choice)
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens of prompt and answers, with those that were cached, kept, drafted and accepted."""
        first, answers = self._answers[0].counts, self._answers
        new, accepted = sum(answer.text.tokens for answer in answers), sum(answer.text.accepted for answer in answers)
        drafted = sum(answer.counts.drafted for answer in answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
            "prompt_tokens_details": {
                "cached_tokens": first.cached,
                "visual_tokens": first.visual,
                "kept_visual_tokens": first.kept,
                "average_visual_tokens": round(first.average, 2),
            },
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": max(0, drafted - accepted),
                "drafted_tokens": drafted,
            },
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self._model}


def _join(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _as_json(pieces: list[Piece]) -> list[dict[str, Any]]:
    return [{"text": piece.text, "drafted": piece.drafted} for piece in pieces]
