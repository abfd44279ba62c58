"""What the drafter computes beside its layers, in plain torch: it is tested without vLLM.

vLLM gives slot i of a draft the token i + 1 of its request, at the position of token i; the target's states, which EAGLE
would use, are not needed, because the drafter has the trunk's layers itself.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

BASE = 128
"""Base of the two digits that a place is written with: numbers below it are exact in every number format."""


def following_positions(positions: Tensor, starts: Tensor) -> Tensor:
    """Positions of the tokens that the slots hold, from those of the slots.

    Where positions count the tokens this is not needed: they are one less for all tokens of a request, and rotary attention sees
    differences alone. With M-RoPE, and where visual tokens have left, the step from a token to the next differs.

    Args:
        positions: positions of the slots, [tokens] or [3, tokens].
        starts: where the requests begin, and where the last one ends, [requests + 1].

    Returns:
        Positions of the same shape; of each request's last slot: one more, as after text.
    """
    ends = starts[1:] - 1
    inside = torch.ones(positions.shape[-1], dtype=torch.bool, device=positions.device)
    inside[ends.clamp(min=0).long()] = False
    shifted = positions.roll(-1, dims=-1)
    return torch.where(inside, shifted, positions + 1)


def position_buffer(tokens: int) -> Tensor:
    """Where `moved_by` writes the positions of at most that many tokens, [3, tokens + 1].

    One column is never used, as in vLLM's own buffer (`v1/worker/gpu_model_runner.py`, `mrope_positions`): torch.compile traces
    with the most tokens, and would take for granted that positions are contiguous, which those of fewer tokens are not.
    """
    return torch.zeros(3, tokens + 1, dtype=torch.long)


def moved_by(positions: Tensor, offsets: Tensor, last: int, out: Tensor) -> Tensor:
    """Positions with the places of visual tokens added, at one address: CUDA graphs read them where they were captured.

    Args:
        positions: [tokens] or [3, tokens].
        offsets: [3, most tokens]; of positions on one axis its first row counts.
        last: the largest position.
        out: what `position_buffer` makes; it is overwritten.

    Returns:
        A part of `out`, of the shape of the positions.
    """
    count = positions.shape[-1]
    target, added = (out, offsets) if positions.ndim == 2 else (out[0], offsets[0])
    return target[..., :count].copy_((positions + added[..., :count]).clamp(max=last))


def split_deepstack(embeddings: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """What a vision tower gives for the input, and what for the states after the first layers (Qwen3-VL).

    Args:
        embeddings: [tokens, width × (1 + levels)].
        width: width of the states.

    Returns:
        [tokens, width], and [tokens, width × levels]; None: there is no level.
    """
    if embeddings.shape[-1] == width:
        return embeddings, None
    return embeddings[..., :width], embeddings[..., width:]


def with_offsets(features: Tensor, offsets: Tensor) -> Tensor:
    """Features with the tokens' offsets in their picture behind them, as pairs of digits.

    Args:
        features: features of the kept visual tokens, [tokens, columns].
        offsets: how far each is from its picture's first position, on each axis, [tokens, axes]; less than 16,384.

    Returns:
        [tokens, columns + 2 × axes].
    """
    digits = torch.stack((offsets // BASE, offsets % BASE), dim=-1).flatten(1)
    return torch.cat((features, digits.to(features.dtype)), dim=1)


def without_offsets(features: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Features [tokens, columns] and offsets [tokens, axes] again; without axes where none were written.

    Args:
        features: as `with_offsets` gives them.
        columns: of the features.
    """
    digits = features[:, columns:].round().long().unflatten(1, (-1, 2)) if features.shape[1] > columns else None
    if digits is None:
        return features, torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
    return features[:, :columns], digits[..., 0] * BASE + digits[..., 1]


def take_indices(positions: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
    """Write the slots' indices in their sequences over their positions.

    vLLM 0.32 (`v1/spec_decode/llm_base_proposer.py`, `_update_positions_dependent_metadata`) takes the position for the index in
    the sequence when it drafts a second token. With M-RoPE and in scout mode they differ after a picture: a draft's keys would
    overwrite those of the prompt, and where positions exceed the longest sequence vLLM would begin at position 0 again.

    Args:
        positions: positions of the slots in vLLM's own buffer, [tokens] or [3, tokens]; it is overwritten.
        lengths: lengths of the sequences, all slots included, [requests].
        starts: where the requests begin, and where the last one ends, [requests + 1].

    Returns:
        By how much the position of each request's last slot exceeded its index, [requests] or [3, requests].
    """
    slots, ends = torch.arange(positions.shape[-1], device=positions.device), starts[1:].long()
    request = torch.bucketize(slots, ends, right=True).clamp(max=len(ends) - 1)  # of padding: the last one
    indices = slots + (lengths.long() - ends)[request]
    gaps = (positions - indices)[..., (ends - 1).clamp(min=0)]
    positions.copy_(indices)
    return gaps


def following_indices(indices: Tensor, gaps: Tensor) -> Tensor:
    """Positions of the tokens that the slots hold, one slot of each request, from the slots' indices.

    Args:
        indices: indices of the slots in their sequences, [tokens] or [3, tokens]; padding comes last.
        gaps: by how much positions exceed indices, [requests] or [3, requests].
    """
    return indices + 1 + pad(gaps, (0, indices.shape[-1] - gaps.shape[-1]))
