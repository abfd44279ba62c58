"""Training losses: pure functions of tensors."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def draft_targets(
    labels: Int[Tensor, " answers"], draft_token_ids: Int[Tensor, " draft_vocabulary"] | None, vocabulary: int
) -> Int[Tensor, " answers"]:
    """Labels as rows of the twig's head; -100 where the twig cannot draft the token."""
    if draft_token_ids is None:
        return labels
    rows = torch.full((vocabulary,), -100, dtype=torch.long, device=labels.device)
    rows[draft_token_ids] = torch.arange(len(draft_token_ids), device=labels.device)
    return rows[labels]


def next_token_loss(
    logits: Float[Tensor, "answers draft_vocabulary"], targets: Int[Tensor, " answers"], count: Tensor | None = None
) -> Float[Tensor, ""]:
    """L_NTP: cross-entropy over answer tokens, as the mean over those that can be drafted, or the sum over `count`.

    `count` is the number of answer tokens in all batches of one optimiser step, so that each token weighs the same.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum().clamp(min=1) if count is None else count)
