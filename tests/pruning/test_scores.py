"""Scores against the attention maps of eager attention."""

import pytest
import torch

from tests.batches import batched
from tests.pruning.trunks import after_trunk, grown
from tests.tiny import IMAGE_TOKEN, VISUAL, prompt, tiny_llava
from twigvlm.base.layers import project_keys
from twigvlm.base.masks import causal_mask
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.attention_rows import attention_rows
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.pruning_head import HeadScores
from twigvlm.pruning.methods.random import RandomScores
from twigvlm.pruning.methods.twig_attention import TwigAttention
from twigvlm.pruning.question import question_mask


def _expected(attention_map, visual, queries):
    rows = attention_map.mean(dim=1)[0]
    row = rows[-1] if queries == "last" else rows[~visual[0]].sum(dim=0)
    return torch.where(visual[0], row, 0.0)[None]


@pytest.mark.parametrize("queries", ["last", "text"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [1, 2, 3, 6])
@torch.no_grad()
def test_rows_of_base_layers(layer, attention, queries):
    maps = tiny_llava(attention="eager")(**prompt(), output_attentions=True).attentions
    trunk = after_trunk(grown(attention))
    scores = BaseLayerAttention(layer, queries)(trunk)
    torch.testing.assert_close(scores, _expected(maps[layer - 1], trunk.tokens.visual, queries))
    assert scores[trunk.tokens.visual].std() > 1e-3  # the test model's attention is not uniform


@torch.no_grad()
def test_layers_have_equal_weight_in_their_mean():
    maps = tiny_llava(attention="eager")(**prompt(), output_attentions=True).attentions
    trunk = after_trunk(grown())
    scores = BaseLayerAttention(2, through=4)(trunk)
    rows = [_expected(one, trunk.tokens.visual, "last") for one in maps[1:4]]
    torch.testing.assert_close(scores, sum(row / row.sum() for row in rows) / 3)


@pytest.mark.parametrize("queries", ["last", "text"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_row_of_the_last_twig_layer(attention, queries):
    eager = after_trunk(grown("eager"))
    first, last = eager.twig.layers
    rotary = eager.tokens.inputs.rotary(None)
    mask = torch.zeros(25, 25).masked_fill(~causal_mask(25, 25), float("-inf"))[None, None]
    middle = first(eager.tokens.hidden, attention_mask=mask, position_embeddings=rotary)
    _, attention_map = last.self_attn(last.input_layernorm(middle), attention_mask=mask, position_embeddings=rotary)
    trunk = after_trunk(grown(attention))
    scores = TwigAttention(queries)(trunk)
    torch.testing.assert_close(scores, _expected(attention_map, trunk.tokens.visual, queries))


@torch.no_grad()
def test_filling_the_twigs_cache_is_running_the_twig():
    trunk = after_trunk(grown())
    assert not trunk.twig_is_filled
    trunk.fill_twig()
    assert trunk.twig_is_filled
    cache = KVCache(8, (), 1, trunk.base.device)
    row = cache.claim(1)
    trunk.twig(trunk.tokens.hidden, trunk.tokens.inputs, trunk.masks, cache.view(row))
    for slot in (6, 7):
        torch.testing.assert_close(trunk.view.cache.contents(slot, row), cache.contents(slot, row))
    assert [trunk.view.held(slot).longest for slot in range(8)] == [25, 25, 0, 0, 0, 0, 25, 25]


scorers = [BaseLayerAttention(1, "text"), BaseLayerAttention(4), TwigAttention(), TwigAttention("text"), HeadScores()]
names = [type(scorer).__name__ + getattr(scorer, "queries", "") for scorer in scorers]


@pytest.mark.parametrize("scorer", [*scorers, RandomScores(3)], ids=[*names, "RandomScores"])
@torch.no_grad()
def test_a_prompt_of_a_batch_gets_the_scores_that_it_gets_alone(scorer):
    model = grown(pruning_head=True)
    prompts = [prompt(1, after=4), prompt(2, before=2, after=9), prompt(3, after=6)]
    trunk = after_trunk(model, batched(prompts))
    scores = scorer(trunk)
    for row, inputs in enumerate(prompts):
        alone, visual = after_trunk(model, inputs), trunk.tokens.visual[row]
        torch.testing.assert_close(scores[row, visual], scorer(alone)[alone.tokens.visual])
    if isinstance(scorer, TwigAttention | HeadScores):  # they leave each prompt, and no padding, in the twig's cache
        assert trunk.view.held(7).lengths.tolist() == [23, 27, 25]


@pytest.mark.parametrize("scorer", [TwigAttention(), HeadScores()], ids=["TwigAttention", "HeadScores"])
@torch.no_grad()
def test_a_ranking_may_be_made_of_several(scorer):
    model = grown(pruning_head=True)
    alone, both = after_trunk(model), after_trunk(model)
    expected = scorer(alone) + TwigAttention()(after_trunk(model))
    torch.testing.assert_close(scorer(both) + TwigAttention()(both), expected)


@torch.no_grad()
def test_many_queries_are_summed_a_few_at_a_time():
    """More than fit in a chunk, and in each row of a batch another number of them."""
    prompts = [prompt(1, before=40, after=40), prompt(2, before=3, after=41), prompt(3)]
    trunk, model = after_trunk(grown(), batched(prompts)), tiny_llava(attention="eager")
    scores = BaseLayerAttention(2, "text")(trunk)
    for row, inputs in enumerate(prompts):
        visual, attention_map = trunk.tokens.visual[row], model(**inputs, output_attentions=True).attentions[1]
        expected = _expected(attention_map, inputs["input_ids"] == IMAGE_TOKEN, "text")
        torch.testing.assert_close(scores[row, visual], expected[expected > 0])
    (first, second, last) = _rows(trunk, trunk.tokens.text)
    assert [len(part[0]) for part in (first.asks, second.asks, last.asks)] == [32, 32, 16]
    assert torch.cat((first.asks, second.asks, last.asks), dim=1).sum(dim=1).tolist() == [80, 44, 9]
    torch.testing.assert_close(first.shares.sum(dim=-1), torch.ones(first.shares.shape[:-1]))


def _rows(trunk, asking):
    layer, tokens = trunk.base.layers[2], trunk.tokens
    keys = project_keys(layer, tokens.hidden, tokens.inputs)
    return list(attention_rows(layer, tokens.hidden, keys, tokens.inputs, asking))


@torch.no_grad()
def test_nobody_asks_and_there_are_no_rows():
    trunk = after_trunk(grown())
    assert _rows(trunk, torch.zeros_like(trunk.tokens.text)) == []


@torch.no_grad()
def test_somebody_asks_also_where_no_text_follows_the_image():
    """Calibration may see such prompts; generation refuses to prune them."""
    asking = question_mask(grown().base.prompt(**prompt(before=3, after=0)))
    assert asking[0].nonzero()[:, 0].tolist() == [3 + VISUAL - 1]
    asking = question_mask(grown().base.prompt(**prompt(before=3, after=4)))
    assert asking[0].nonzero()[:, 0].tolist() == list(range(3 + VISUAL, 3 + VISUAL + 4))


@pytest.mark.parametrize("layer", [0, 7])
def test_a_base_layer_must_exist(layer):
    with pytest.raises(ValueError, match=f"layer={layer}: must be 1 to 6"):
        BaseLayerAttention(layer)(after_trunk(grown()))
