"""A twig on every family's tiny model, grown once for all tests."""

from functools import cache

import torch

from tests.families import TRUNK, TWIG, prompt, tiny
from twigvlm import TwigConfig, TwigVLM

CHAIN = {"speculate": "chain", "draft_threshold": 0.0, "draft_length": 4}


@cache
def grown(name, attention="sdpa", pruning_head=False):
    torch.manual_seed(0)
    return TwigVLM.grow(tiny(name, attention), TwigConfig(TRUNK, TWIG, pruning_head=pruning_head))


@cache
def inputs_of(name, kind, seed=0):
    return prompt(grown(name).model, name, kind, seed)


def visual_tokens(name, kind):
    return int(grown(name).base.visual_mask(inputs_of(name, kind)["input_ids"]).sum())


def answer(output, inputs):
    return getattr(output, "sequences", output)[0, inputs["input_ids"].shape[1] :].tolist()
