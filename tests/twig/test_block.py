"""What a fresh twig is made of."""

import pytest
import torch

from tests.tiny import VOCABULARY, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.base.vlm import BaseVLM
from twigvlm.twig.block import Twig


def _same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(("init", "first"), [("next", 2), ("last", 4)])
def test_layers_are_copies_of_base_layers(init, first):
    base = BaseVLM(tiny_llava())
    twig = Twig(base, TwigConfig(2, 2, init=init))
    for offset, layer in enumerate(twig.layers):
        source = base.layers[first + offset]
        assert _same(layer, source)
        assert layer.self_attn.layer_idx == 6 + offset
        assert source.self_attn.layer_idx == first + offset
        assert layer.mlp.down_proj.weight.data_ptr() != source.mlp.down_proj.weight.data_ptr()
    assert _same(twig.norm, base.norm)
    assert torch.equal(twig.head.weight, base.head.weight)


def test_random_layers_are_new():
    base = BaseVLM(tiny_llava())
    twig = Twig(base, TwigConfig(2, 2, init="random"))
    weight = twig.layers[0].self_attn.q_proj.weight
    assert not torch.equal(weight, base.layers[2].self_attn.q_proj.weight)
    assert 0.01 < weight.std() < 0.04
    assert torch.equal(twig.norm.weight, torch.ones(32))
    assert torch.equal(twig.layers[1].input_layernorm.weight, torch.ones(32))


@pytest.mark.parametrize("head", ["own", "shared"])
@torch.no_grad()
def test_a_reduced_vocabulary_is_a_choice_of_rows(head):
    base = BaseVLM(tiny_llava())
    ids = torch.tensor([7, 3, 50])
    hidden = torch.randn(2, 4, 32)
    whole = Twig(base, TwigConfig(head=head)).logits(hidden)
    reduced = Twig(base, TwigConfig(head=head, draft_vocabulary=3), ids).logits(hidden)
    assert whole.shape == (2, 4, VOCABULARY)
    torch.testing.assert_close(reduced, whole[..., ids])
    torch.testing.assert_close(whole, base.logits(hidden))


def test_a_shared_head_is_not_part_of_the_twig():
    base = BaseVLM(tiny_llava())
    state = Twig(base, TwigConfig(head="shared", draft_vocabulary=2), torch.tensor([1, 2])).state_dict()
    assert not [name for name in state if "head" in name]
    assert state["draft_token_ids"].tolist() == [1, 2]
    shared = Twig(base, TwigConfig(head="shared"))
    assert shared.base_head is base.head
    assert all(parameter is not base.head.weight for parameter in shared.parameters())


def test_only_the_twig_learns():
    grown = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2))
    assert not any(parameter.requires_grad for parameter in grown.model.parameters())
    assert all(parameter.requires_grad for parameter in grown.twig.parameters())
    before = {name: tensor.clone() for name, tensor in grown.model.state_dict().items()}
    captured = grown.base.prompt(**prompt())
    tokens, masks = grown.base.token_inputs(captured), grown.base.masks()
    hidden = grown.base.run_layers(captured.hidden, 0, 2, tokens, masks)
    optimizer = torch.optim.SGD(grown.twig.parameters(), lr=0.1)
    grown.twig.logits(grown.twig(hidden, tokens, masks)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in grown.twig.parameters())
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in grown.model.state_dict().items())


def test_the_base_stays_in_evaluation_mode():
    grown = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2)).train()
    assert grown.twig.training
    assert not any(module.training for module in grown.model.modules())


@pytest.mark.parametrize(
    ("config", "ids", "message"),
    [
        (TwigConfig(4, 3), None, "trunk_layers=4 and twig_layers=3: together at most 6"),
        (TwigConfig(2, 2, final_wipe=7), None, "final_wipe=7: at most 6"),
        (TwigConfig(draft_vocabulary=3), None, "draft_vocabulary=3: needs as many draft_token_ids, got none"),
        (TwigConfig(draft_vocabulary=3), [1, 2], "draft_vocabulary=3: needs as many draft_token_ids, got 2"),
        (TwigConfig(), [1, 2], "draft_vocabulary=None: needs as many draft_token_ids, got 2"),
        (TwigConfig(draft_vocabulary=2), [1, 1], "distinct ids from 0 to 99"),
        (TwigConfig(draft_vocabulary=2), [1, 100], "distinct ids from 0 to 99"),
        (TwigConfig(draft_vocabulary=2), [-1, 1], "distinct ids from 0 to 99"),
    ],
)
def test_what_does_not_fit_is_refused(config, ids, message):
    with pytest.raises(TwigVLMError, match=message):
        TwigVLM.grow(tiny_llava(), config, None if ids is None else torch.tensor(ids))


def test_the_twig_follows_its_base_to_another_attention():
    model = tiny_llava()
    twigvlm = TwigVLM.grow(model, TwigConfig(2, 2))
    inputs = prompt()
    before = twigvlm.generate(**inputs, keep=4, speculate="chain", max_new_tokens=8)
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in twigvlm.twig.layers} == {"eager"}
    after = twigvlm.generate(**inputs, keep=4, speculate="chain", max_new_tokens=8)
    assert torch.equal(before, after)
