"""Early exit: the base's first layers draft with its own head, and change no answer."""

import pytest
import torch

from tests import families
from tests.batches import batched
from tests.tiny import prompt, tiny_llava
from tests.twigs import grown
from twigvlm import TwigVLM
from twigvlm.errors import TwigVLMError

EXIT = {"speculate": "exit", "draft_length": 4, "draft_threshold": 0.0}
LONG = {"max_new_tokens": 20, "return_dict_in_generate": True}


def test_where_the_other_layers_do_nothing_every_draft_is_accepted():
    base = tiny_llava(deep_scale=0.0, from_layer=3)
    output = TwigVLM.without_twig(base, trunk_layers=3).generate(**prompt(), **EXIT, **LONG)
    assert output.sequences.tolist() == base.generate(**prompt(), max_new_tokens=20).tolist()
    assert output.drafted_lengths == output.accepted_lengths == [[4, 4, 4, 4]]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_batches_are_answered_as_without_drafts(name):
    base = families.tiny(name)
    batch = batched([families.prompt(base, name, kind) for kind in ("images", "text")])
    expected = base.generate(**batch, max_new_tokens=20, do_sample=False)
    output = TwigVLM.without_twig(base, trunk_layers=2).generate(**batch, **EXIT, **LONG)
    assert output.sequences.tolist() == expected.tolist()
    assert sum(map(sum, output.drafted_lengths)) > 0


@pytest.mark.parametrize(
    "pruning", [{}, {"keep": 5, "final_wipe": 4}, {"keep": 5, "refocus": 0.9}, {"pruner": "visionzip", "retain": 8}]
)
def test_a_trunk_drafts_beside_a_twig_of_a_reduced_vocabulary(pruning):
    model = grown(reduced=True)
    for seed in range(2):
        plain = model.generate(**prompt(seed), **pruning, **LONG)
        output = model.generate(**prompt(seed), **pruning, **EXIT, **LONG)
        assert output.sequences.tolist() == plain.sequences.tolist()
        assert sum(output.drafted_lengths[0]) > 0


def test_a_seed_draws_the_same():
    model = grown()
    for seed in range(3):
        options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 14}
        torch.manual_seed(seed)
        expected = model.model.generate(**prompt(seed), **options)
        torch.manual_seed(seed)
        assert model.generate(**prompt(seed), **options, **EXIT).tolist() == expected.tolist()


def test_without_a_trunk_nothing_can_exit():
    with pytest.raises(TwigVLMError, match="speculate='exit': the twig has no trunk"):
        TwigVLM.without_twig(tiny_llava()).generate(**prompt(), **EXIT, max_new_tokens=2)
