"""The recipe of the shipped twig, on a tiny model."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.sapling import twig
from tests.recipes.test_ablations import SHAPE
from tests.tiny import tiny_llava
from twigvlm.checkpoints.twig_files import WEIGHTS
from twigvlm.model import TwigVLM


def test_a_twig_begins_from_another_bases_twig_but_for_the_tokens_that_it_drafts(tmp_path):
    torch.manual_seed(0)
    TwigVLM.grow(tiny_llava(), SHAPE, torch.arange(40)).save_pretrained(tmp_path)
    old = load_file(tmp_path / WEIGHTS)
    torch.manual_seed(1)
    model = TwigVLM.grow(tiny_llava(), SHAPE, torch.arange(20, 60))
    twig.begin_from(model, tmp_path / WEIGHTS)
    state = model.twig.state_dict()
    assert all(torch.equal(state[name].float(), old[name].float()) for name in old if name != "draft_token_ids")
    assert state["draft_token_ids"].tolist() == list(range(20, 60))


def test_a_twig_of_another_shape_is_refused(tmp_path):
    model = TwigVLM.grow(tiny_llava(), dataclasses.replace(SHAPE, twig_layers=1), torch.arange(40))
    save_file({"layers.7.weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(SystemExit, match="does not fit a twig of this shape"):
        twig.begin_from(model, tmp_path / WEIGHTS)
