"""How much memory keys and values need, and how much there is."""

from collections.abc import Sequence
from itertools import pairwise

import psutil
import torch

from twigvlm.base.vlm import BaseVLM
from twigvlm.engine.row import Row
from twigvlm.twig.block import Twig

_ANSWER = 256  # new tokens that a row is admitted with; longer answers grow into what is free


def row_bytes(base: BaseVLM, twig: Twig, row: Row) -> int:
    """Bytes that a row needs: keys and values of its prompt between the cuts and of the beginning of its answer, and where it
    looks again, states of its visual tokens and the keys that rank them."""
    per_token = 2 * base.config.num_key_value_heads * _head_width(base) * base.dtype.itemsize
    visual, text = row.visual, row.length - row.visual
    answer = min(row.max_new_tokens, _ANSWER)
    borders = [0, *(cut.layer for cut in row.cuts), base.num_layers]
    kept = [visual, *(cut.keep for cut in row.cuts)]
    tokens = sum(
        (stop - start) * (text + count + answer) for (start, stop), count in zip(pairwise(borders), kept, strict=True)
    )
    return per_token * (tokens + len(twig.layers) * (row.length + answer)) + sight_bytes(base, row)


def together_bytes(base: BaseVLM, twig: Twig, rows: Sequence[Row]) -> int:
    """Bytes that rows need side by side: the buffers have room in every row for what the largest one holds."""
    sights = [sight_bytes(base, row) for row in rows]
    cached = [row_bytes(base, twig, row) - sight for row, sight in zip(rows, sights, strict=True)]
    return len(rows) * max(cached, default=0) + sum(sights)


def sight_bytes(base: BaseVLM, row: Row) -> int:
    """Bytes of what a row needs, beside keys and values, to look again; 0 where it does not."""
    if row.refocus is None:
        return 0
    ranking = 2 * base.config.num_attention_heads * _head_width(base)
    return row.visual * (base.config.hidden_size + ranking) * base.dtype.itemsize


def _head_width(base: BaseVLM) -> int:
    config = base.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def free_bytes(device: torch.device) -> int:
    """Memory that keys and values may take: what is free of an accelerator's, half of the machine's otherwise."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return int(psutil.virtual_memory().total) // 2
