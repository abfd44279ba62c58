"""Turns of a conversation, read off its labels."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from twigvlm.training.data.dataset import IGNORE


def last_prompt_tokens(labels: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """True at each turn's last prompt token, the one before its answer."""
    answers = labels != IGNORE
    asking = torch.zeros_like(answers)
    asking[:, :-1] = answers[:, 1:] & ~answers[:, :-1]
    return asking


def draw_turns(
    labels: Int[Tensor, "batch tokens"], visual_mask: Bool[Tensor, "batch tokens"], generator: torch.Generator
) -> Bool[Tensor, "batch tokens"]:
    """True at the last prompt token of one turn in each row, among the turns that follow a visual token; all False without."""
    asking = last_prompt_tokens(labels) & (visual_mask.cumsum(dim=1) > 0)
    chosen = torch.zeros_like(asking)
    for row, turns in enumerate(asking):
        positions = turns.nonzero()[:, 0]
        if len(positions):
            chosen[row, positions[int(torch.randint(len(positions), (), generator=generator))]] = True
    return chosen


def answer_length(labels: Int[Tensor, " tokens"], query: int) -> int:
    """Tokens of the answer that follows the last prompt token at `query`."""
    ends = (labels[query + 1 :] == IGNORE).nonzero()
    return int(ends[0]) if len(ends) else len(labels) - query - 1
