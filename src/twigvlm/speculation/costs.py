"""What the passes of a speculative step cost on this machine, measured once."""

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise

import torch

from twigvlm.base.token_inputs import slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import MOST_NODES
from twigvlm.kv.cache import KVCache
from twigvlm.timing import clock_of
from twigvlm.twig.block import Twig

NODES = (1, 2, 4, 8, 16, 32, MOST_NODES)
"""Sizes of a pass that are timed."""
PROMPT = 256
"""Tokens of the prompt that they follow."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one pass of n nodes: entry n of each table; entry 0 is 0."""

    trunk: tuple[float, ...]
    """Layers 1..K."""
    draft: tuple[float, ...]
    """Layers 1..K, twig and its head."""
    verify: tuple[float, ...]
    """Layers K+1..L and the head."""
    fill: float
    """Of one prompt token that enters the twig."""

    @property
    def most(self) -> int:
        """Most nodes of a pass."""
        return len(self.verify) - 1

    def of_rows(self, rows: int) -> "StepCosts":
        """Of passes of n nodes in each of several rows, beyond the measured sizes in proportion to the largest."""

        def table(measured: tuple[float, ...]) -> tuple[float, ...]:
            sizes = (nodes * rows for nodes in range(self.most + 1))
            return tuple(measured[min(size, self.most)] * max(1.0, size / self.most) for size in sizes)

        return StepCosts(table(self.trunk), table(self.draft), table(self.verify), self.fill)


@torch.inference_mode()
def calibrate(base: BaseVLM, twig: Twig, repeats: int = 3) -> StepCosts:
    """Time passes of several sizes after a prompt of text, and how it enters the twig; the sizes between are interpolated.

    A shorter pass never counts as dearer than a longer one: what else the machine does only ever adds to a time. Takes a
    few seconds.

    Args:
        repeats: timed passes of each size, after one to warm up; the median counts.
    """
    clock = clock_of(base.device)
    trunk, layers = twig.config.trunk_layers, base.num_layers
    prompt = base.text_prompt(PROMPT)
    cache = KVCache(twig.last_slot + 1, (trunk, layers), NODES[-1], base.device)
    row = cache.claim(1)
    view = cache.view(row)
    masks, inputs = base.masks(), base.token_inputs(prompt)
    hidden = base.run_layers(prompt.hidden, 0, trunk, inputs, masks, view)
    base.run_layers(hidden, trunk, layers, inputs, masks, view)

    def filling() -> float:
        cache.set_lengths(twig.first_slot, twig.last_slot + 1, row, [0])
        began = clock()
        twig.fill(hidden, inputs, masks, cache.view(row))
        return clock() - began

    def seconds(nodes: int) -> tuple[float, float, float]:
        rows = hidden[:, :nodes]
        part = slice_tokens(inputs, 0, nodes)
        began = clock()
        states = base.run_layers(rows, 0, trunk, part, masks, view)
        middle = clock()
        twig.logits(twig(states, part, masks, view)).float().log_softmax(dim=-1)
        late = clock()
        base.logits(base.run_layers(states, trunk, layers, part, masks, view)).argmax(dim=-1).tolist()
        ended = clock()
        cache.advance(0, twig.last_slot + 1, row, -nodes)
        return middle - began, late - began, ended - late

    fill = statistics.median([filling() for _ in range(repeats + 1)][1:]) / prompt.hidden.shape[1]
    taken = {nodes: [seconds(nodes) for _ in range(repeats + 1)][1:] for nodes in NODES}
    tables: list[list[tuple[int, float]]] = [[], [], []]
    for nodes in reversed(NODES):
        for table, times in zip(tables, zip(*taken[nodes], strict=True), strict=True):
            cheapest = table[-1][1] if table else math.inf
            table.append((nodes, min(statistics.median(times), cheapest)))
    trunk_table, draft_table, verify_table = (_interpolated([(0, 0.0), *reversed(table)]) for table in tables)
    return StepCosts(trunk_table, draft_table, verify_table, fill)


def _interpolated(points: list[tuple[int, float]]) -> tuple[float, ...]:
    values = [points[0][1]]
    for (start, low), (stop, high) in pairwise(points):
        values += [low + (high - low) * step / (stop - start) for step in range(1, stop - start + 1)]
    return tuple(values)
