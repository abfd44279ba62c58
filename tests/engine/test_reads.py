"""On an accelerator a decode step waits for one read, whatever the number of rows, and makes no tensor from Python's data."""

import numpy as np
import pytest
import torch

from tests import families
from tests.engine.engines import engine_on, make_runner
from tests.engine.transfers import transfers
from tests.tiny import prompt
from tests.twigs import grown
from twigvlm import TwigConfig, TwigVLM

WAYS = {
    "none": {},
    "chain": {"speculate": "chain", "draft_threshold": 0.05},
    "tree": {"speculate": "tree", "tree_nodes": 12, "tree_expand": 3, "tree_width": 4},
    "lookup": {"speculate": "lookup"},
}
ways = pytest.mark.parametrize("way", WAYS)


def counted(model, way, prompts, **options):
    """Reads and tensors from Python's data of each step after the first ones, all rows decoding."""
    engine = engine_on(model, make_runner(model, True, **WAYS[way]))
    for inputs in prompts:
        engine.add(inputs, max_new_tokens=60, **options)
        engine.step()
    steps = []
    for _ in range(4):
        with transfers() as found:
            engine.step()
        print(way, len(prompts), dict(found.reads), dict(found.tensors))
        steps.append((found.reads.total(), found.tensors.total()))
    assert len(engine.active) == len(prompts)
    return steps


@ways
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_step_reads_once(way, rows, attention):
    prompts = [prompt(seed, 2 + seed) for seed in range(rows)]
    assert counted(grown(attention=attention), way, prompts, keep=5) == [(1, 0)] * 4


@ways
def test_refocusing_reads_once_more_where_nothing_is_exchanged(way):
    prompts = [prompt(seed, 2 + seed) for seed in range(3)]
    assert counted(grown(), way, prompts, keep=5, refocus=0.01) == [(2, 0)] * 4


@ways
def test_sampling_reads_nothing_more(way):
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    assert counted(grown(), way, [prompt(seed, 2 + seed) for seed in range(3)], **options) == [(1, 0)] * 4


@ways
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_windows_and_positions_of_families_read_nothing_more(way, name):
    base = families.tiny(name)
    model = TwigVLM.grow(base, TwigConfig(families.TRUNK, families.TWIG))
    prompts = [families.prompt(base, name, kind) for kind in ("images", "text")]
    assert counted(model, way, prompts) == [(1, 0)] * 4


def test_transfers_are_seen():
    """Guards the tests above."""
    values = torch.arange(3)
    reads = [
        values[0].item,
        values.tolist,
        values.cpu,
        values.numpy,
        values.nonzero,
        lambda: bool(values[0]),
        lambda: int(values[0]),
        lambda: range(3)[values[0]],
        lambda: 2 in values,
        lambda: np.asarray(values),
        lambda: values[values > 1],
        lambda: values.cpu().tolist(),
        lambda: torch.where(values > 1),
        lambda: values.repeat_interleave(values),
        lambda: torch.equal(values, values),
    ]
    made = [
        lambda: torch.tensor([1]),
        lambda: torch.as_tensor(1.0),
        lambda: torch.from_numpy(np.zeros(2)),
        lambda: values.new_tensor([1]),
        lambda: values[[0, 1]],
    ]
    neither = [
        lambda: values + 1,
        lambda: values[values],
        lambda: values[1:],
        lambda: torch.arange(3),
        lambda: torch.as_tensor(values),
        lambda: torch.where(values > 1, values, 0),
    ]
    for calls, expected in ((reads, (1, 0)), (made, (0, 1)), (neither, (0, 0))):
        for index, call in enumerate(calls):
            with transfers() as found:
                call()
            assert (found.reads.total(), found.tensors.total()) == expected, index
