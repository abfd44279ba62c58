"""Turns of a conversation, read off its labels."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from twigvlm.training.data.dataset import IGNORE


def last_prompt_tokens(labels: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """True at each turn's last prompt token, the one before its answer.

    Args:
        labels: ids at answers, -100 elsewhere.
    """
    answers = labels != IGNORE
    asking = torch.zeros_like(answers)
    asking[:, :-1] = answers[:, 1:] & ~answers[:, :-1]
    return asking


def draw_turns(
    labels: Int[Tensor, "batch tokens"],
    visual_mask: Bool[Tensor, "batch tokens"],
    generator: torch.Generator,
    span: int | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """True at one token in each row: the last prompt token of one of the turns that follow a visual token; all False without.

    Args:
        labels: ids at answers, -100 elsewhere.
        visual_mask: True at visual tokens.
        generator: on the CPU.
        span: the token may also be any that comes a multiple of `span` tokens after that one and has answer tokens after it;
            None: it is that one.
    """
    asking = last_prompt_tokens(labels) & (visual_mask.cumsum(dim=1) > 0)
    chosen = torch.zeros_like(asking)
    for row, turns in enumerate(asking):
        positions = turns.nonzero()[:, 0]
        if len(positions):
            token = int(positions[int(torch.randint(len(positions), (), generator=generator))])
            if span is not None:
                parts = -(-answer_length(labels[row], token) // span)
                token += span * int(torch.randint(parts, (), generator=generator))
            chosen[row, token] = True
    return chosen


def answer_length(labels: Int[Tensor, " tokens"], query: int) -> int:
    """How many tokens of an answer follow a token.

    Args:
        labels: ids at answers, -100 elsewhere.
        query: index of the token, the last one of a prompt or one of its answer.
    """
    ends = (labels[query + 1 :] == IGNORE).nonzero()
    return int(ends[0]) if len(ends) else len(labels) - query - 1
