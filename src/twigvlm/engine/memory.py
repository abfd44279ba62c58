"""How much memory keys and values need, and how much there is."""

from collections.abc import Sequence

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from twigvlm.base.vlm import BaseVLM
from twigvlm.engine.row import Row
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.cut import Need
from twigvlm.speculation.batch import Batch


def row_bytes(batch: Batch, row: Row, drafts_by_twig: bool) -> NDArray[np.int64]:
    """Bytes that a row needs in each layer of base and twig, [layers]: for what is left of its prompt there, and for the new
    tokens that the cache has room for; longer answers grow into what is free.

    Args:
        batch: batch that the row will join.
        row: row that is not admitted yet.
        drafts_by_twig: whether drafts need the twig; otherwise only pruning may, where the pruner names it.
    """
    base, twig, reserve = batch.base, batch.twig, batch.cache.reserve
    per_token = 2 * base.config.num_key_value_heads * _head_width(base) * base.dtype.itemsize
    visual, text = row.visual, row.length - row.visual
    borders = [0, *(cut.layer for cut in row.cuts), base.num_layers]
    kept = [visual, *(cut.keep for cut in row.cuts)]
    in_base = text + np.repeat(np.array(kept, np.int64), np.diff(borders))
    needs_twig = drafts_by_twig or (row.pruner is not None and Need.TWIG in row.pruner.needs)
    in_twig = [row.length + reserve if needs_twig else 0] * len(twig.layers)
    return per_token * np.array([*(in_base + reserve), *in_twig], np.int64)


def together_bytes(cache: KVCache, rows: Sequence[Row]) -> int:
    """Bytes the cache needs with these rows, each buffer padded to its longest row; 0 if the existing buffers already suffice.

    Args:
        cache: cache of the rows that are decoded already.
        rows: those rows, then at least one that joins them.
    """
    there = cache.bytes_of_a_row()
    needed = np.maximum(there, np.max([row.cache_bytes for row in rows], axis=0))
    if len(rows) <= cache.capacity_for(0) and (needed == there).all() and not rows[-1].refocus_bytes:
        return 0
    looking = [row.refocus_bytes for row in rows if row.refocus_bytes]
    return cache.capacity_for(len(rows)) * int(needed.sum()) + len(looking) * max(looking, default=0)


def refocus_bytes(base: BaseVLM, row: Row) -> int:
    """Bytes that a row needs, beside keys and values, to look again at its visual tokens; 0 where it does not. Rows that do so
    side by side need as much as the largest of them."""
    if row.refocus is None:
        return 0
    ranking = 2 * base.config.num_attention_heads * _head_width(base)
    return row.visual * (base.config.hidden_size + ranking) * base.dtype.itemsize


def _head_width(base: BaseVLM) -> int:
    config = base.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def free_bytes(device: torch.device) -> int:
    """Bytes that keys and values may take: nine tenths of a GPU's free memory, or half of the machine's memory elsewhere."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (int(torch.cuda.mem_get_info(device)[0]) + reserved) * 9 // 10
    return int(psutil.virtual_memory().total) // 2
