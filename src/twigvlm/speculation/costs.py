"""What the passes of a speculative step cost on this machine, measured once."""

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twigvlm import compat
from twigvlm.base.cpu_linear import is_alone
from twigvlm.base.token_inputs import slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import MAX_NODES
from twigvlm.files import replacing
from twigvlm.kv.cache import KVCache
from twigvlm.timing import clock_of
from twigvlm.twig.block import Twig

NODES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, MAX_NODES)
"""Sizes of a pass that are timed."""
PROMPT = 512
"""Tokens of the prompt that they follow."""
PATIENCE = 15.0
"""Seconds after which a calibration starts no further round: on a busy machine each takes long."""


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
    """Seconds for one prompt token that enters the twig."""

    @property
    def max_nodes(self) -> int:
        """Most nodes of a pass."""
        return len(self.verify) - 1

    def of_rows(self, rows: int) -> "StepCosts":
        """Costs of passes of n nodes in each of several rows, beyond the measured sizes in proportion to the largest."""

        def table(measured: tuple[float, ...]) -> tuple[float, ...]:
            sizes = (nodes * rows for nodes in range(self.max_nodes + 1))
            return tuple(measured[min(size, self.max_nodes)] * max(1.0, size / self.max_nodes) for size in sizes)

        return StepCosts(table(self.trunk), table(self.draft), table(self.verify), self.fill)


@torch.inference_mode()
def calibrate(base: BaseVLM, twig: Twig, repeats: int = 4) -> StepCosts:
    """Time passes of several sizes after a prompt of text, and how it enters the twig; the sizes between are interpolated.

    Other load on the machine is kept out of the times. On a CPU the clock is this thread's, which stands still while other
    processes have the core. What is left only ever adds to a time, so that the shortest of several rounds counts; the sizes take
    turns, so that a busy moment does not fall upon one of them alone; and the tables are made to rise with the number of nodes.
    Takes a few seconds.

    Args:
        base: the base.
        twig: its twig.
        repeats: rounds of timed passes of every size, after one to warm up; fewer where they take longer than `PATIENCE`.
    """
    clock, end = _working_clock(base.device), time.monotonic() + PATIENCE
    trunk, layers = twig.config.trunk_layers, base.num_layers
    prompt = base.text_prompt(PROMPT)
    cache = KVCache(twig.last_layer_idx + 1, (trunk, layers), NODES[-1], base.device)
    row = cache.claim(1)
    view = cache.view(row)
    masks, inputs = base.masks(), base.token_inputs(prompt)
    hidden = base.run_layers(prompt.hidden, 0, trunk, inputs, masks, view)
    base.run_layers(hidden, trunk, layers, inputs, masks, view)

    def filling() -> float:
        cache.set_lengths(*twig.cache_layers, row, [0])
        began = clock()
        twig.fill(hidden, inputs, masks, cache.view(row))
        return clock() - began

    def seconds(nodes: int) -> tuple[float, float, float]:
        rows = hidden[:, :nodes]
        part = slice_tokens(inputs, 0, nodes)
        seen = torch.ones(1, nodes, nodes, dtype=torch.bool, device=base.device).tril()
        of_tree = base.tree_masks(seen) if nodes > 1 else masks
        began = clock()
        states = base.run_layers(rows, 0, trunk, part, of_tree, view)
        middle = clock()
        twig.logits(twig(states, part, of_tree, view)).float().log_softmax(dim=-1)
        late = clock()
        base.logits(base.run_layers(states, trunk, layers, part, of_tree, view)).argmax(dim=-1).tolist()
        ended = clock()
        cache.advance(0, twig.last_layer_idx + 1, row, -nodes)
        return middle - began, late - began, ended - late

    rounds: list[tuple[float, list[tuple[float, float, float]]]] = []
    for turn in range(repeats + 1):
        if turn > 1 and time.monotonic() > end:
            break
        timed = filling(), [seconds(nodes) for nodes in NODES]
        rounds += [timed] if turn else []
    fill = min(filled for filled, _ in rounds) / prompt.hidden.shape[1]
    tables: list[list[tuple[int, float]]] = [[], [], []]
    for index, nodes in reversed(list(enumerate(NODES))):
        for part, table in enumerate(tables):
            cheapest = table[-1][1] if table else math.inf
            table.append((nodes, min(cheapest, *(passes[index][part] for _, passes in rounds))))
    trunk_table, draft_table, verify_table = (_interpolated([(0, 0.0), *reversed(table)]) for table in tables)
    return StepCosts(trunk_table, draft_table, verify_table, fill)


def _working_clock(device: torch.device) -> Callable[[], float]:
    """Seconds of work; Windows counts a thread's time in steps that are too large."""
    return time.thread_time if device.type == "cpu" and os.name != "nt" else clock_of(device)


def cached_costs(base: BaseVLM, twig: Twig, refresh: bool = False) -> StepCosts:
    """The costs from a file of this machine and model; without one, or to `refresh` it, they are measured and written there.

    The file lies under `$XDG_CACHE_HOME/twigvlm`, by default `~/.cache/twigvlm`. Where it cannot be written, nothing is kept.
    """
    file = _costs_file(base, twig)
    if not refresh:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            tables = json.loads(file.read_text())
            trunk, draft, verify = (tuple(map(float, tables[name])) for name in ("trunk", "draft", "verify"))
            return StepCosts(trunk, draft, verify, float(tables["fill"]))
    costs = calibrate(base, twig)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(asdict(costs)))
    return costs


def _costs_file(base: BaseVLM, twig: Twig) -> Path:
    """By all that the costs depend on: machine, threads, versions, attention, the layers as they are, and where they are cut."""
    device = base.device
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    versions = [version(library) for library in ("twigvlm", "torch", "transformers")]
    machine = [processor, str(device), torch.get_num_threads(), is_alone(), *versions]
    # The layers do not show where the trunk ends, nor a shared head how many of the base's rows it uses.
    twig_parts = [*_layout(twig), twig.config.trunk_layers, twig.config.draft_vocabulary]
    parts = [*machine, base.attention, *_layout(base.decoder), *_layout(base.head), *twig_parts, NODES, PROMPT]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "twigvlm" / f"costs-{name}.json"


def _layout(module: nn.Module) -> list[Any]:
    """What a module's passes cost follows from: the kinds of its parts, quantised and compiled ones too, and their weights."""
    kinds = [(name, type(part).__name__, compat.is_compiled(part)) for name, part in module.named_modules()]
    weights = [(name, list(one.shape), str(one.dtype), str(one.device)) for name, one in module.named_parameters()]
    return [kinds, weights]


def processor_name() -> str:
    """What the system calls this machine's CPU."""
    with contextlib.suppress(OSError):
        fields = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        names = (value.strip() for field, _, value in fields if field.strip() == "model name")
        return next(names, platform.machine())
    return platform.processor() or platform.machine()


def _interpolated(points: list[tuple[int, float]]) -> tuple[float, ...]:
    values = [points[0][1]]
    for (start, low), (stop, high) in pairwise(points):
        values += [low + (high - low) * step / (stop - start) for step in range(1, stop - start + 1)]
    return tuple(values)
