"""Scores against the attention maps of eager attention."""

import pytest
import torch
from twigvlm.engine.prefill import TrunkOutput

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.attention_rows import attention_scores
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.twig_attention import TwigAttention


def after_trunk(attention, trunk_layers=2, seed=0):
    grown = TwigVLM.grow(tiny_llava(seed, attention=attention), TwigConfig(trunk_layers, twig_layers=2))
    captured = grown.base.prompt(**prompt(seed))
    rope, masks = grown.base.token_inputs(captured), grown.base.masks(captured)
    cache = KVCache(8, 1)
    hidden = grown.base.run_layers(captured.hidden, 0, trunk_layers, rope, masks, cache)
    return TrunkOutput(grown.base, grown.twig, captured, hidden, rope, masks, cache)


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
    trunk = after_trunk(attention)
    scores = BaseLayerAttention(layer, queries)(trunk)
    torch.testing.assert_close(scores, _expected(maps[layer - 1], trunk.prompt.visual_mask, queries))
    assert scores[trunk.prompt.visual_mask].std() > 1e-3  # the test model's attention is not uniform


@pytest.mark.parametrize("queries", ["last", "text"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_row_of_the_last_twig_layer(attention, queries):
    eager, trunk = after_trunk("eager"), after_trunk(attention)
    first, last = eager.twig.layers
    mask = eager.masks(25, (0,))
    middle = first(eager.hidden, attention_mask=mask, position_embeddings=eager.rope.of(None))
    _, attention_map = last.self_attn(
        last.input_layernorm(middle), attention_mask=mask, position_embeddings=eager.rope.of(None)
    )
    scores = TwigAttention(queries)(trunk)
    torch.testing.assert_close(scores, _expected(attention_map, trunk.prompt.visual_mask, queries))
    assert [trunk.cache.get_seq_length(slot) for slot in range(8)] == [25, 25, 0, 0, 0, 0, 25, 25]


@torch.no_grad()
def test_filling_the_cache_is_running_the_twig():
    trunk = after_trunk("sdpa")
    trunk.grow()
    cache = KVCache(8, 1)
    trunk.twig(trunk.hidden, trunk.rope, trunk.masks, cache)
    for slot in (6, 7):
        torch.testing.assert_close(trunk.cache.held(slot), cache.held(slot))


@torch.no_grad()
def test_a_ranking_may_be_made_of_several():
    alone, both = (after_trunk("sdpa") for _ in range(2))
    expected = TwigAttention()(alone)
    torch.testing.assert_close(TwigAttention()(both) + TwigAttention()(both), 2 * expected)


def test_chunks_make_no_difference():
    queries, keys = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 12, 8)
    visual = torch.rand(2, 12) < 0.5
    positions, counts = torch.arange(3, 12).expand(2, -1), (9, 4)
    whole = attention_scores(queries, keys, 0.35, positions, counts, visual, chunk=100)
    torch.testing.assert_close(attention_scores(queries, keys, 0.35, positions, counts, visual, chunk=2), whole)
    fewer = attention_scores(queries[1:, :, :4], keys[1:], 0.35, positions[1:, :4], (4,), visual[1:])
    torch.testing.assert_close(whole[1:], fewer)  # a row sums its own queries only


def test_scores_of_all_visual_keys_sum_to_one_query():
    queries, keys = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 12, 8)
    scores = attention_scores(queries, keys, 0.35, torch.tensor([[11]]), (1,), torch.ones(1, 12, dtype=torch.bool))
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("layer", [0, 7])
def test_a_base_layer_must_exist(layer):
    with pytest.raises(ValueError, match=f"layer={layer}: must be 1 to 6"):
        BaseLayerAttention(layer)(after_trunk("sdpa"))
