"""The smallest and the largest budgets of every method, in batches of prompts with two images, one and none."""

import re
from functools import cache

import pytest
import torch

from tests.batches import batched
from tests.pruning.trunks import grown as grown_tiny
from tests.tiny import IMAGE_TOKEN, VISUAL, prompt
from twigvlm import TwigVLM, TwigVLMError
from twigvlm.pruning.methods import METHODS
from twigvlm.pruning.methods.fastervlm import FasterVLM
from twigvlm.pruning.methods.fastv import FastV
from twigvlm.pruning.methods.fitprune import FitPrune

LAYERS = 6
OWN = {"twig": {}, "twig-diverse": {"diverse": True}, "twig-even": {"retain_per_image": True}, "scout": {"scout": True}}
NAMES = [*(name for name in METHODS if name != "random"), "random:0", *OWN]


@cache
def grown() -> TwigVLM:
    return grown_tiny(trunk_layers=1, pruning_head=True)


def _options(name, retain):
    pruner = FitPrune(tuple(0.9**layer for layer in range(1, LAYERS))) if name == "fitprune" else name
    return {"retain": retain, "max_new_tokens": 2, **OWN.get(name, {"pruner": pruner})}


@cache
def _prompts():
    first, second = prompt(2, before=2, after=3), prompt(3, before=1, after=5)
    two = {name: torch.cat((first[name], second[name]), dim=int(name != "pixel_values")) for name in first}
    ids = torch.randint(2, IMAGE_TOKEN, (1, 7), generator=torch.Generator().manual_seed(0))
    return two, prompt(1), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _smallest(name):
    """A budget that leaves as little as possible of two images."""
    with pytest.raises(TwigVLMError, match="must be ") as caught:
        grown().generate(**_prompts()[0], **_options(name, 0.01))
    low = re.search(r"must be ([\d.]+) to", str(caught.value))
    assert low is not None
    return float(low[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_of_the_range_in_a_batch(name):
    least, batch = _smallest(name), batched(_prompts())
    for retain in (least, VISUAL + 0.2):
        options = {**_options(name, retain), "return_dict_in_generate": True}
        together = grown().generate(**batch, **options, speculate="chain", draft_length=2, draft_threshold=0.01)
        assert together.average_visual[:2] == [pytest.approx(retain, abs=0.5)] * 2
        assert together.average_visual[2] == 0
        if retain == least:
            alone = [grown().generate(**inputs, **options) for inputs in _prompts()]
            assert together.sequences[:, -2:].tolist() == [answer.sequences[0, -2:].tolist() for answer in alone]
            assert len(alone[0].kept_indices[0]) == 1


class Blind(FasterVLM):
    """Looks at the tower without saying so."""

    needs = frozenset()


class BlindFastV(FastV):
    """Looks at a layer's input without saying so."""

    needs = frozenset()


@pytest.mark.parametrize(("pruner", "words"), [(Blind(), "name Need.VISION"), (BlindFastV(), "name Need.LAST_LAYER")])
def test_what_a_method_looks_at_must_be_among_its_needs(pruner, words):
    with pytest.raises(TwigVLMError, match=words):
        grown().generate(**prompt(), pruner=pruner, retain=14, max_new_tokens=1)
