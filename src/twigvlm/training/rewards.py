"""Rewards of stage 2: how likely the base's answer is when it sees what a pruning keeps (Eq. 14)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.token_inputs import TokenInputs, select_rows
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import TwigConfig
from twigvlm.pruning.budget import twig_cuts
from twigvlm.pruning.run import run_cuts
from twigvlm.pruning.view import Tokens


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
    base: BaseVLM,
    hidden: Float[Tensor, "batch tokens width"],
    visual_mask: Bool[Tensor, "batch tokens"],
    inputs: TokenInputs,
    masks: Masks,
    cases: Sequence[Case],
    config: TwigConfig,
    chunk: int | None = None,
) -> list[Float[Tensor, " group"]]:
    """Rewards: for each case, the mean log-probability of its answer under the base, for each pruning (Eq. 14).

    The answer's tokens are text: never pruned, and they follow the prompt causally, so one pass scores all of them.

    Args:
        base: the base.
        hidden: states after layer K of a batch padded on the right.
        visual_mask: True at visual tokens.
        inputs: inputs of all tokens.
        masks: masks of the batch.
        cases: what to reward.
        config: of the twig: K, K_f, and φ, the share of the kept tokens, those drawn first, that stay after layer K_f.
        chunk: prunings, of all cases together, that the base runs at once; None: all.
    """
    if not cases:
        return []
    each = [(case, kept) for case in cases for kept in case.kept]
    index = torch.arange(hidden.shape[1], device=hidden.device)
    layers = base.num_layers
    shape = layers, *config.cut_layers(layers)
    losses: list[Tensor] = []
    for start in range(0, len(each), chunk or len(each)):
        part = each[start : start + (chunk or len(each))]
        rows = torch.tensor([case.row for case, _ in part], device=hidden.device)
        ends = torch.tensor([case.end for case, _ in part], device=hidden.device)
        visual = visual_mask[rows] & (index < ends[:, None])
        drawn = [kept for _, kept in part]
        cuts = [
            twig_cuts(len(kept), count, *shape) for kept, count in zip(drawn, visual.sum(dim=1).tolist(), strict=True)
        ]
        tokens = Tokens(hidden[rows], select_rows(inputs, rows), visual, tuple(case.end for case, _ in part))
        left = run_cuts(base, tokens, config.trunk_layers, layers, cuts, partial(_first_drawn, drawn), masks)
        spans = [
            states[end - len(case.answer) : end]
            for states, end, (case, _) in zip(left.hidden, left.lengths, part, strict=True)
        ]
        logits = base.logits(torch.cat(spans)).float()
        answers = [case.answer for case, _ in part]
        loss = F.cross_entropy(logits, torch.cat(answers), reduction="none")
        losses += [answer_loss.mean() for answer_loss in loss.split([len(answer) for answer in answers])]
    return list((-torch.stack(losses)).split([len(case.kept) for case in cases]))
