"""Conversations about pictures through `twigvlm serve`, with and without its prefix cache; for `recipes.serving_bench`."""

from statistics import median
from typing import Any

from recipes.sapling.turns import Turn
from recipes.serving_client import Timed, serving, stream
from twigvlm.evaluation.questions import exact_match

TURNS = 3
WAYS = {"prefix cache": (), "none": ("--prefix-bytes", "0")}
"""Options of the servers, which take turns."""


def measure(conversations: list[list[tuple[dict[str, Any], Turn]]]) -> dict[str, Any]:
    """Ask each conversation's questions one after another, each with all turns before it.

    Args:
        conversations: of each, the body of every question as if it were alone, and the question; all about one picture.

    Returns:
        By way: of each turn, seconds to the `first` token, their median, and the share of `right` answers in per cent; and how
        many answers of the first way are the `same` in the other one.
    """
    with serving(*WAYS["prefix cache"]) as (cached, _), serving(*WAYS["none"]) as (fresh, _):
        addresses = dict(zip(WAYS, (cached, fresh), strict=True))
        for address in addresses.values():
            stream(address, conversations[0][0][0])  # once before any time counts
        found: dict[str, list[list[Timed]]] = {way: [] for way in WAYS}
        for number, conversation in enumerate(conversations[1:]):
            for way in sorted(WAYS, reverse=number % 2 == 1):
                found[way].append(_converse(addresses[way], [body for body, _ in conversation]))
    asked = [[turn for _, turn in conversation] for conversation in conversations[1:]]
    ways = {way: {"first": _firsts(answers), "right": _right(answers, asked)} for way, answers in found.items()}
    pairs = [pair for both in zip(*found.values(), strict=True) for pair in zip(*both, strict=True)]
    return {
        "conversations": len(asked), "answers": len(pairs), "ways": ways,
        "same": sum(one.text == other.text for one, other in pairs),
    }  # fmt: skip


def _converse(address: str, bodies: list[dict[str, Any]]) -> list[Timed]:
    """Only the first turn brings the picture; every request holds all that was said before."""
    messages: list[dict[str, Any]] = []
    answers = []
    for body in bodies:
        (asked,) = body["messages"]
        parts = [part for part in asked["content"] if part["type"] == "text" or not messages]
        messages.append({**asked, "content": parts})
        answer = stream(address, {**body, "messages": messages})
        if answer.error:
            raise SystemExit(f"a turn failed: {answer.error}")
        messages.append({"role": "assistant", "content": answer.text})
        answers.append(answer)
    return answers


def _firsts(answers: list[list[Timed]]) -> list[float]:
    return [median(turn.first for turn in turns) for turns in zip(*answers, strict=True)]


def _right(answers: list[list[Timed]], asked: list[list[Turn]]) -> float:
    pairs = [pair for both in zip(answers, asked, strict=True) for pair in zip(*both, strict=True)]
    return 100 * sum(exact_match(one.text, turn.answer) for one, turn in pairs) / len(pairs)
