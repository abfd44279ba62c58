"""Tiny TwigVLMs, and costs of passes that nobody measured."""

from functools import lru_cache

import torch

from tests.tiny import VOCABULARY, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.speculation.costs import StepCosts

LAYERS = 6
MAX_NODES = 64


@lru_cache(maxsize=256)
def grown(seed=0, trunk=2, twig=2, init="next", head="own", reduced=False, agreeing=True, attention="sdpa"):
    """A tiny TwigVLM; `agreeing`: the layers that the twig skips contribute little, so that long drafts are accepted."""
    model = tiny_llava(seed, LAYERS, attention, *((0.03, trunk) if agreeing else ()))
    config = TwigConfig(trunk, twig, init, head, draft_vocabulary=60 if reduced else None)
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:60] if reduced else None
    return TwigVLM.grow(model, config, ids)


def step_costs(draft=1.0, verify=10.0, per_node=0.0, fill=0.0):
    """Passes that cost a constant, and a verification that costs more for more nodes."""
    return StepCosts(
        trunk=(0.0, *[0.1] * MAX_NODES),
        draft=(0.0, *[draft] * MAX_NODES),
        verify=(0.0, *[verify + per_node * (nodes - 1) for nodes in range(1, MAX_NODES + 1)]),
        fill=fill,
    )
