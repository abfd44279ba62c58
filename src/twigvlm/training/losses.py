"""Training losses: pure functions of tensors."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def draft_targets(
    labels: Int[Tensor, " answers"], draft_token_ids: Int[Tensor, " draft_vocabulary"] | None, vocabulary: int
) -> Int[Tensor, " answers"]:
    """Labels as rows of the twig's head; -100 where the twig cannot draft the token.

    Args:
        labels: ids of answer tokens.
        draft_token_ids: ids that the twig can draft, in the order of its head's rows; None: all.
        vocabulary: number of the base's ids.
    """
    if draft_token_ids is None:
        return labels
    rows = torch.full((vocabulary,), -100, dtype=torch.long, device=labels.device)
    rows[draft_token_ids] = torch.arange(len(draft_token_ids), device=labels.device)
    return rows[labels]


def next_token_loss(
    logits: Float[Tensor, "answers draft_vocabulary"], targets: Int[Tensor, " answers"], count: Tensor
) -> Float[Tensor, ""]:
    """L_NTP, in nats: cross-entropy summed over the answer tokens that can be drafted, over `count`.

    Args:
        logits: the shallow model's.
        targets: from `draft_targets`.
        count: number of answer tokens in all batches of one optimiser step, so that each token weighs the same.
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum") / count


def divergence(
    target: Float[Tensor, "*rows choices"], prediction: Float[Tensor, "*rows choices"]
) -> Float[Tensor, "*rows"]:
    """KL(target ‖ prediction), in nats; what the target excludes adds nothing.

    Args:
        target: logarithm of a distribution, -inf at what it excludes.
        prediction: logarithm of another one.
    """
    terms = target.exp() * (target - prediction)
    return terms.masked_fill(target == float("-inf"), 0.0).sum(dim=-1)


def prediction_loss(
    teacher: Float[Tensor, "answers draft_vocabulary"],
    student: Float[Tensor, "answers draft_vocabulary"],
    temperature: float,
    clip: float,
) -> Float[Tensor, " answers"]:
    """L_PredKL of each answer token (Eq. 10), 0 to 1.

    As in the published code: both distributions softened by the temperature, the divergence times its square, clipped, and
    divided by the clip. The gradient of a clipped token is scaled by clip/KL and not cut off: the tokens on which the twig is
    furthest off teach too, each no more than one at the clip.

    Args:
        teacher: the base's logits; over a reduced draft vocabulary those of its tokens.
        student: the shallow model's logits.
        temperature: divides the logits of both.
        clip: limit on the divergence of a token, in nats.
    """
    soft = ((logits.float() / temperature).log_softmax(dim=-1) for logits in (teacher, student))
    loss = divergence(*soft) * temperature**2
    return loss / loss.detach().clamp(min=clip)


def attending(
    teacher: Float[Tensor, "batch queries visual"], among: Bool[Tensor, "batch queries"] | None = None
) -> Bool[Tensor, "batch queries"]:
    """True at queries from which the base sees a visual token.

    Args:
        teacher: logarithm of the base's attention.
        among: queries that count; None: all.
    """
    attends = (teacher > float("-inf")).any(dim=-1)
    return attends if among is None else attends & among


def attention_loss(
    teacher: Float[Tensor, "batch queries visual"],
    student: Float[Tensor, "batch queries visual"],
    among: Bool[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, ""]:
    """L_AttnKL (Eq. 11): KL(a_b ‖ s) in nats, as the mean over queries from which the base sees a visual token; 0 if there are
    none.

    Args:
        teacher: logarithm of the base's attention.
        student: logarithm of the P-Head's scores.
        among: queries that count; None: all.
    """
    attends = attending(teacher, among)
    return divergence(teacher, student)[attends].sum() / attends.sum().clamp(min=1)


def advantages(rewards: Float[Tensor, " group"]) -> Float[Tensor, " group"]:
    """(r - mean) / std within a group (Eq. 15); 0 for a group without spread.

    Args:
        rewards: of the prunings of one sample.
    """
    above = rewards - rewards[0]  # exactly 0 for equal rewards, whose mean may be rounded
    return (above - above.mean()) / above.std().clamp(min=1e-6)  # nor does rounding pass for a spread


def policy_loss(log_probabilities: Float[Tensor, " group"], advantages: Float[Tensor, " group"]) -> Float[Tensor, ""]:
    """REINFORCE with a group's baseline, strictly on-policy: -(1/G) Σ Â_i log π(a_i) (Eq. 15, which is maximised).

    Args:
        log_probabilities: log π(a_i) of each pruning.
        advantages: Â_i of each pruning.
    """
    return -(advantages * log_probabilities).mean()
