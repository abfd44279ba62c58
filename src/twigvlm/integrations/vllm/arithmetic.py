"""What the drafter computes beside its layers, in plain torch: it is tested without vLLM.

vLLM gives slot i of a draft the token i + 1 of its request, at the position of token i; the target's states, which EAGLE
would use, are not needed, because the drafter has the trunk's layers itself.
"""

import torch
from torch import Tensor

BASE = 128
"""Of the two digits that a place is written with: numbers below it are exact in every number format."""


def following_positions(positions: Tensor, starts: Tensor | None) -> Tensor:
    """Positions of the tokens that the slots hold, from those of the slots.

    Where positions count the tokens this is not needed: they are one less for all tokens of a request, and rotary attention sees
    differences alone. With M-RoPE, and where visual tokens have left, the step from a token to the next differs.

    Args:
        positions: of the slots, [tokens] or [3, tokens].
        starts: where the requests begin, and where the last one ends, [requests + 1]; None: every slot is a request.

    Returns:
        Positions of the same shape; of each request's last slot: one more, as behind text.
    """
    following = positions + 1
    if starts is None:
        return following
    ends = starts[1:] - 1
    inside = torch.ones(positions.shape[-1], dtype=torch.bool, device=positions.device)
    inside[ends.clamp(min=0).long()] = False
    shifted = positions.roll(-1, dims=-1)
    return torch.where(inside, shifted, following)


def moved_by(positions: Tensor, offsets: Tensor, last: int, out: Tensor) -> Tensor:
    """Positions with the places of visual tokens added, at one address: CUDA graphs read them where they were captured.

    Args:
        positions: [tokens] or [3, tokens].
        offsets: [3, most tokens]; of positions on one axis its first row counts.
        last: the largest position.
        out: [3, most tokens]; it is overwritten.

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
        width: of the states.

    Returns:
        [tokens, width], and [tokens, width × levels]; None: there is no level.
    """
    if embeddings.shape[-1] == width:
        return embeddings, None
    return embeddings[..., :width], embeddings[..., width:]


def with_offsets(features: Tensor, offsets: Tensor) -> Tensor:
    """Features with the tokens' offsets in their picture behind them, as pairs of digits.

    Args:
        features: of the kept visual tokens, [tokens, columns].
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


def slots_of_newest(lengths: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Where each request's newest token goes in a paged cache.

    vLLM 0.32 (`v1/spec_decode/llm_base_proposer.py`, `_update_positions_dependent_metadata`) takes the rotary position for
    the index in the sequence when it drafts a second token; with M-RoPE they differ behind an image, and the keys of a
    draft would overwrite those of the prompt.

    Args:
        lengths: of the sequences, the newest token included, [requests].
        blocks: of each request in order, [requests, blocks].
        block_size: tokens of a block.

    Returns:
        [requests].
    """
    index = (lengths.long() - 1).clamp(min=0)
    block = blocks.gather(1, (index // block_size)[:, None])[:, 0].long()
    return block * block_size + index % block_size
