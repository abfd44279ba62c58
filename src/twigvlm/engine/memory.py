"""How much memory keys and values need, and how much there is."""

from collections.abc import Sequence
from itertools import pairwise

import psutil
import torch

from twigvlm.base.vlm import BaseVLM
from twigvlm.engine.row import Row
from twigvlm.kv.cache import KVCache
from twigvlm.twig.block import Twig


def row_bytes(base: BaseVLM, twig: Twig, row: Row, reserve: int) -> int:
    """Bytes of the buffers that a row needs: keys and values of its prompt between the cuts, and room for its answer.

    Args:
        base: the base.
        twig: its twig.
        row: not admitted yet.
        reserve: new tokens that the cache has room for; longer answers grow into what is free.
    """
    per_token = 2 * base.config.num_key_value_heads * _head_width(base) * base.dtype.itemsize
    visual, text = row.visual, row.length - row.visual
    borders = [0, *(cut.layer for cut in row.cuts), base.num_layers]
    kept = [visual, *(cut.keep for cut in row.cuts)]
    tokens = sum(
        (stop - start) * (text + count + reserve) for (start, stop), count in zip(pairwise(borders), kept, strict=True)
    )
    return per_token * (tokens + len(twig.layers) * (row.length + reserve))


def together_bytes(cache: KVCache, rows: Sequence[Row]) -> int:
    """Bytes that rows need side by side: the buffers have room in every row for what the largest one holds. 0 where they have
    that room already, however large they have become.

    Args:
        cache: the cache of those that are decoded already.
        rows: those, and others that join them; one at least.
    """
    largest, there = max(row.cache_bytes for row in rows), cache.bytes_of_a_row()
    if len(rows) <= cache.capacity_for(0) and largest <= there and not rows[-1].sight_bytes:
        return 0
    return cache.capacity_for(len(rows)) * max(largest, there) + sum(row.sight_bytes for row in rows)


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
    """Memory that keys and values may take: nine tenths of what is free of an accelerator's, half of the machine's otherwise."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (int(torch.cuda.mem_get_info(device)[0]) + reserved) * 9 // 10
    return int(psutil.virtual_memory().total) // 2
