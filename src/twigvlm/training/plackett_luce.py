"""Drawing visual tokens one after another without replacement: the Plackett-Luce distribution (Eq. 12 and 13)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sample(
    log_scores: Float[Tensor, " visual"], group: int, keep: int, generator: torch.Generator
) -> Int[Tensor, "group keep"]:
    """`group` ordered draws of `keep` different tokens each.

    The Gumbel trick: the highest scores after adding independent Gumbel noise, in descending order, are such a draw.

    Args:
        log_scores: logarithm of the scores s.
        group: G, number of draws.
        keep: R, tokens of a draw.
        generator: on the CPU, so that a seed draws alike on every device.
    """
    noise = -torch.empty(group, len(log_scores), device="cpu").exponential_(generator=generator).log()
    return (log_scores + noise.to(log_scores)).topk(keep, dim=-1).indices


def log_probability(
    log_scores: Float[Tensor, " visual"], actions: Int[Tensor, "group keep"]
) -> Float[Tensor, " group"]:
    """log π(a) = Σ_j [log s(a_j) - log(1 - Σ_{i<j} s(a_i))].

    The mass that is left before a draw is summed up from its end, never as 1 minus what is gone: late in a long draw that
    difference cancels to 0 or below. In logarithms, so that no score is too small.

    Args:
        log_scores: logarithm of the scores s, which sum to 1.
        actions: the tokens drawn, in order, as indices of `log_scores`.
    """
    scores = log_scores.expand(len(actions), -1)
    drawn = scores.gather(1, actions)
    left = drawn.flip(1)
    if actions.shape[1] < len(log_scores):
        never = scores.scatter(1, actions, float("-inf")).logsumexp(dim=1, keepdim=True)
        left = torch.cat((never, left), dim=1)
    left = left.logcumsumexp(dim=1)[:, -actions.shape[1] :]
    return drawn.sum(dim=1) - left.sum(dim=1)


def first_draw_entropy(log_scores: Float[Tensor, " visual"]) -> Float[Tensor, ""]:
    """Entropy of the distribution of the first token that is drawn, in nats: 0 to the logarithm of the number of tokens.

    Args:
        log_scores: logarithm of the scores s, which sum to 1.
    """
    return -(log_scores.exp() * log_scores).sum()
