"""Rewards of stage 2: how likely the base's answer is when it sees what a pruning keeps (Eq. 14)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.token_inputs import select_rows
from twigvlm.config import TwigConfig
from twigvlm.pruning.budget import twig_cuts
from twigvlm.pruning.run import run_cuts
from twigvlm.pruning.view import Tokens
from twigvlm.training.trunk import TrunkBatch


@dataclass(frozen=True)
class Case:
    """One question of a batch with its reference answer, and the prunings to reward."""

    row: int
    """Of the batch."""
    end: int
    """Tokens of the shortest input that predicts all scored tokens."""
    answer: Int[Tensor, " answer"]
    """Ids of the answer, or of the part of it that the choice is made for."""
    kept: Int[Tensor, "group keep"]
    """Positions of the visual tokens that each pruning keeps, in the order in which they were drawn."""


def _first_drawn(
    drawn: Sequence[Int[Tensor, " keep"]], tokens: Tokens, layer: int, keep: Sequence[int]
) -> Bool[Tensor, "batch tokens"]:
    """Of each row the tokens that were drawn first, as many as it keeps."""
    index = torch.arange(tokens.hidden.shape[1], device=tokens.hidden.device).expand(tokens.visual.shape)
    index = index if tokens.index is None else tokens.index
    stays = [torch.isin(row, kept[:count]) for row, kept, count in zip(index, drawn, keep, strict=True)]
    return torch.stack(stays) & tokens.visual


@torch.no_grad()
def answer_likelihoods(
    batch: TrunkBatch, cases: Sequence[Case], config: TwigConfig, chunk: int | None = None
) -> list[Float[Tensor, " group"]]:
    """Rewards: for each case, the mean log-probability of its answer under the base, for each pruning (Eq. 14).

    The answer's tokens are text: never pruned, and they follow the prompt causally, so one pass scores all of them.

    Args:
        batch: after layer K.
        cases: what to reward.
        config: of the twig: K, K_f, and φ, the share of the kept tokens, those drawn first, that stay after layer K_f.
        chunk: prunings, of all cases together, that the base runs at once; None: all.

    Returns:
        In nats per token, in float32.
    """
    each = [(case, kept) for case in cases for kept in case.kept]
    size = chunk or max(1, len(each))
    rewards = [
        reward for start in range(0, len(each), size) for reward in _rewards(batch, each[start : start + size], config)
    ]
    return list(torch.stack(rewards).split([len(case.kept) for case in cases])) if cases else []


def _rewards(batch: TrunkBatch, part: Sequence[tuple[Case, Int[Tensor, " keep"]]], config: TwigConfig) -> list[Tensor]:
    """Rewards of some prunings, by one pass of the base."""
    base, device = batch.base, batch.hidden.device
    layers = base.num_layers
    rows = torch.tensor([case.row for case, _ in part], device=device)
    ends = torch.tensor([case.end for case, _ in part], device=device)
    visual = batch.visual_mask[rows] & (torch.arange(batch.hidden.shape[1], device=device) < ends[:, None])
    drawn = [kept for _, kept in part]
    cuts = [
        twig_cuts(len(kept), count, layers, *config.cut_layers(layers))
        for kept, count in zip(drawn, visual.sum(dim=1).tolist(), strict=True)
    ]
    tokens = Tokens(batch.hidden[rows], select_rows(batch.inputs, rows), visual, tuple(case.end for case, _ in part))
    left = run_cuts(base, tokens, batch.layer, layers, cuts, partial(_first_drawn, drawn), batch.masks)
    spans = [
        states[end - len(case.answer) : end]
        for states, end, (case, _) in zip(left.hidden, left.lengths, part, strict=True)
    ]
    logits = base.logits(torch.cat(spans)).float()
    answers = [case.answer for case, _ in part]
    losses = F.cross_entropy(logits, torch.cat(answers), reduction="none")
    return [-answer_losses.mean() for answer_losses in losses.split([len(answer) for answer in answers])]
