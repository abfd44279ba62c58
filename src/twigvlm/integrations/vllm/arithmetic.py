"""What the drafter computes beside its layers, in plain torch: it is tested without vLLM.

vLLM gives slot i of a draft the token i + 1 of its request, at the position of token i; the target's states, which EAGLE
would use, are not needed, because the drafter has the trunk's layers itself.
"""

import torch
from torch import Tensor


def following_positions(positions: Tensor, starts: Tensor | None) -> Tensor:
    """Positions of the tokens that the slots hold, from those of the slots.

    With positions of one axis this is not needed: they are one less for all tokens of a request, and rotary attention sees
    differences alone. On the three axes of M-RoPE the step from a token to the next differs inside an image.

    Args:
        positions: of the slots, [3, tokens].
        starts: where the requests begin, and where the last one ends, [requests + 1]; None: every slot is a request.

    Returns:
        Positions of the same shape; of each request's last slot: one more, as behind text.
    """
    following = positions + 1
    if starts is None:
        return following
    ends = starts[1:] - 1
    inside = torch.ones(positions.shape[1], dtype=torch.bool, device=positions.device)
    inside[ends.clamp(min=0).long()] = False
    shifted = positions.roll(-1, dims=1)
    return torch.where(inside, shifted, following)


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
