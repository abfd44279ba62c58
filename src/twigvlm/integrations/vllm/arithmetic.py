"""The drafter's computations outside its layers, in plain torch so that they can be tested without vLLM.

vLLM gives slot i of a draft token i + 1 of its request, at the position of token i. The target's hidden states, which EAGLE
would use, are not needed, because the drafter has the trunk's layers itself.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

BASE = 128
"""Offsets are written as two digits of this base: numbers below it are exact in every floating-point format."""


def following_positions(positions: Tensor, starts: Tensor) -> Tensor:
    """Positions of the tokens that the slots hold, from those of the slots.

    This is not needed where positions simply count tokens: they are then one too low for all tokens of a request, and rotary
    attention depends on differences only. With M-RoPE, and after pruned visual tokens, positions advance by other steps.

    Args:
        positions: positions of the slots, [tokens] or [3, tokens].
        starts: index of each request's first slot, and the end of the last request, [requests + 1].

    Returns:
        Positions of the same shape. The last slot of each request gets its own position plus 1, as after text.
    """
    ends = starts[1:] - 1
    inside = torch.ones(positions.shape[-1], dtype=torch.bool, device=positions.device)
    inside[ends.clamp(min=0).long()] = False
    shifted = positions.roll(-1, dims=-1)
    return torch.where(inside, shifted, positions + 1)


def position_buffer(tokens: int) -> Tensor:
    """A buffer [3, tokens + 1] into which `moved_by` writes the positions of up to `tokens` tokens.

    One column is never used, as in vLLM's own buffer (`v1/worker/gpu_model_runner.py`, `mrope_positions`): torch.compile traces
    with the largest number of tokens, and would otherwise assume contiguous positions, which those of fewer tokens are not.
    """
    return torch.zeros(3, tokens + 1, dtype=torch.long)


def moved_by(positions: Tensor, offsets: Tensor, last: int, out: Tensor) -> Tensor:
    """Positions plus the offsets of visual tokens, always at the same address, because CUDA graphs read a fixed address.

    Args:
        positions: positions, [tokens] or [3, tokens].
        offsets: offsets, [3, at least tokens]; for positions on one axis, the first row counts.
        last: the largest position allowed.
        out: result of `position_buffer`; it is overwritten.

    Returns:
        A part of `out`, of the shape of the positions.
    """
    count = positions.shape[-1]
    target, added = (out, offsets) if positions.ndim == 2 else (out[0], offsets[0])
    return target[..., :count].copy_((positions + added[..., :count]).clamp(max=last))


def split_deepstack(embeddings: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Split a vision tower's output into input embeddings and what is added after the first layers (Qwen3-VL's deepstack).

    Args:
        embeddings: output of the tower, [tokens, width × (1 + levels)].
        width: width of the hidden states.

    Returns:
        Input embeddings [tokens, width], and deepstack features [tokens, width × levels] or, without any level, None.
    """
    if embeddings.shape[-1] == width:
        return embeddings, None
    return embeddings[..., :width], embeddings[..., width:]


def with_offsets(features: Tensor, offsets: Tensor) -> Tensor:
    """Append the tokens' offsets in their picture to their features, each offset as a pair of digits of base `BASE`.

    Args:
        features: features of the kept visual tokens, [tokens, columns].
        offsets: distance of each token from its picture's first position on each axis, [tokens, axes]; less than 16,384.

    Returns:
        [tokens, columns + 2 × axes].
    """
    digits = torch.stack((offsets // BASE, offsets % BASE), dim=-1).flatten(1)
    return torch.cat((features, digits.to(features.dtype)), dim=1)


def without_offsets(features: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Undo `with_offsets`: features [tokens, columns], and offsets [tokens, axes], where axes is 0 if none were appended.

    Args:
        features: result of `with_offsets`.
        columns: number of columns of the features alone.
    """
    digits = features[:, columns:].round().long().unflatten(1, (-1, 2)) if features.shape[1] > columns else None
    if digits is None:
        return features, torch.zeros(len(features), 0, dtype=torch.long, device=features.device)
    return features[:, :columns], digits[..., 0] * BASE + digits[..., 1]


def take_indices(positions: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
    """Overwrite the slots' positions with their indices in their sequences.

    vLLM 0.32 (`v1/spec_decode/llm_base_proposer.py`, `_update_positions_dependent_metadata`) takes the position for the index in
    the sequence when it drafts a second token. With M-RoPE and in scout mode they differ after a picture: a draft's keys would
    overwrite those of the prompt, and where positions exceed the longest sequence vLLM would begin at position 0 again.

    Args:
        positions: positions of the slots in vLLM's own buffer, [tokens] or [3, tokens]; it is overwritten.
        lengths: lengths of the sequences, all slots included, [requests].
        starts: index of each request's first slot, and the end of the last request, [requests + 1].

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
