import pytest
import torch

from tests.tiny import VISUAL, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.base.cache import LayeredCache
from twigvlm.decoding.prefill import Trunk
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.baselines.base_layer import BaseLayerAttention
from twigvlm.pruning.baselines.random import RandomScores


def after_trunk(model, inputs):
    base = model.base
    opened = base.prompt(**inputs)
    rope, masks = base.rope(opened), base.masks(opened)
    cache = LayeredCache(model.twig.last_slot + 1, 1)
    hidden = base.run_layers(opened.hidden, 0, model.config.trunk_layers, rope, masks, cache)
    return Trunk(base, model.twig, opened, hidden, rope, masks, cache)


@pytest.mark.parametrize("layer", [1, 2, 3, 6])
@torch.no_grad()
def test_layer_scores_are_the_base_s_own_attention(layer):
    """What a user would get from output_attentions: the last row, averaged over heads, at visual tokens."""
    model = TwigVLM.grow(tiny_llava(attention="eager"), TwigConfig(2, 2))
    inputs = prompt(3)
    trunk = after_trunk(model, inputs)
    lengths = list(trunk.cache.lengths)
    scores = BaseLayerAttention(layer)(trunk)
    maps = model.model(**inputs, output_attentions=True).attentions
    expected = maps[layer - 1][:, :, -1].mean(dim=1).masked_fill(~trunk.prompt.visual_mask, 0)
    torch.testing.assert_close(scores, expected)
    assert trunk.cache.lengths == lengths


@pytest.mark.parametrize("layer", [0, 7])
def test_a_layer_must_exist(layer):
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2))
    with pytest.raises(TwigVLMError, match=f"layer={layer}: must be 1 to 6"):
        model.generate(**prompt(), keep=4, scorer=BaseLayerAttention(layer), max_new_tokens=1)


def test_random_choice_is_seeded_and_even():
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2))
    inputs = prompt()
    trunk = after_trunk(model, inputs)
    assert torch.equal(RandomScores(1)(trunk), RandomScores(1)(trunk))
    state = torch.get_rng_state()
    counts = torch.zeros(inputs["input_ids"].shape[1])
    for seed in range(400):
        scores = RandomScores(seed)(trunk)[0].masked_fill(~trunk.prompt.visual_mask[0], -1)
        counts[scores.topk(VISUAL // 4).indices] += 1
    assert torch.equal(torch.get_rng_state(), state)
    visual = counts[trunk.prompt.visual_mask[0]]
    assert visual.sum() == 400 * VISUAL // 4
    assert 70 < visual.min() <= visual.max() < 130  # 100 expected, standard deviation 8.7
