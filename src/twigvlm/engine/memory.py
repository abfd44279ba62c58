"""How much memory keys and values need, and how much there is."""

import os
from itertools import pairwise

import torch

from twigvlm.base.vlm import BaseVLM
from twigvlm.engine.row import Row
from twigvlm.twig.block import Twig

_ANSWER = 256  # new tokens that a row is admitted with; longer answers grow into what is free


def row_bytes(base: BaseVLM, twig: Twig, row: Row) -> int:
    """Bytes that a row needs: keys and values of its prompt between the cuts and of the beginning of its answer, and where it
    looks again, states of its visual tokens and the keys that rank them."""
    config = base.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_key_value_heads * width * base.dtype.itemsize
    visual = int(row.prompt.visual_mask[row.index].sum())
    text = row.length - visual
    answer = min(row.max_new_tokens, _ANSWER)
    borders = [0, *(cut.layer for cut in row.cuts), base.num_layers]
    kept = [visual, *(cut.keep for cut in row.cuts)]
    tokens = sum(
        (stop - start) * (text + count + answer) for (start, stop), count in zip(pairwise(borders), kept, strict=True)
    )
    return per_token * (tokens + len(twig.layers) * (row.length + answer)) + sight_bytes(base, row)


def sight_bytes(base: BaseVLM, row: Row) -> int:
    """Bytes of what a row needs, beside keys and values, to look again; 0 where it does not."""
    if row.refocus is None:
        return 0
    config = base.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    visual = int(row.prompt.visual_mask[row.index].sum())
    return visual * (config.hidden_size + 2 * config.num_attention_heads * width) * base.dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that keys and values may take: what is free of an accelerator's, half of the machine's otherwise."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
