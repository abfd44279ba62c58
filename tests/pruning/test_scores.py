"""Scores against the attention maps of eager attention."""

import pytest
import torch

from tests.batches import batched
from tests.pruning.trunks import after_trunk, grown
from tests.tiny import prompt, tiny_llava
from twigvlm.base.masks import causal_mask
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.attention_rows import attention_scores
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.pruning_head import HeadScores
from twigvlm.pruning.methods.random import RandomScores
from twigvlm.pruning.methods.twig_attention import TwigAttention


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


def test_chunks_make_no_difference():
    queries, keys = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8)
    visual = torch.rand(2, 12) < 0.5
    positions, counts = torch.arange(3, 12).expand(2, -1), (9, 4)
    whole = attention_scores(queries, keys, 0.35, positions, counts, visual, chunk=100)
    torch.testing.assert_close(attention_scores(queries, keys, 0.35, positions, counts, visual, chunk=2), whole)
    fewer = attention_scores(queries[1:, :, :4], keys[1:], 0.35, positions[1:, :4], (4,), visual[1:])
    torch.testing.assert_close(whole[1:], fewer)  # a row sums its own queries only


def test_a_window_leaves_nothing_for_what_lies_before_it():
    queries, keys, visual = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 12, 8), torch.ones(1, 12, dtype=torch.bool)
    scores = attention_scores(queries, keys, 0.35, torch.tensor([[9]]), (1,), visual, window=4)
    assert (scores[0] > 0).tolist() == [6 <= key <= 9 for key in range(12)]
    inside = attention_scores(queries, keys[:, :, 6:10], 0.35, torch.tensor([[3]]), (1,), visual[:, 6:10])
    torch.testing.assert_close(scores[:, 6:10], inside)


def test_scores_of_all_visual_keys_sum_to_one_query():
    queries, keys = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 12, 8)
    scores = attention_scores(queries, keys, 0.35, torch.tensor([[11]]), (1,), torch.ones(1, 12, dtype=torch.bool))
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("layer", [0, 7])
def test_a_base_layer_must_exist(layer):
    with pytest.raises(ValueError, match=f"layer={layer}: must be 1 to 6"):
        BaseLayerAttention(layer)(after_trunk(grown()))
