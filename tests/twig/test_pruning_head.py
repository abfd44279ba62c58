"""The P-Head against a reference of loops, and what a twig does with one."""

from math import sqrt

import torch

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.base.token_inputs import rotate
from twigvlm.pruning.attention_rows import visual_attention
from twigvlm.pruning.methods.pruning_head import HeadScores, VisualQuery, log_visual_attention
from twigvlm.pruning.methods.twig_attention import TwigAttention
from twigvlm.twig.pruning_head import PruningHead


def grown(**options):
    torch.manual_seed(0)
    return TwigVLM.grow(tiny_llava(), TwigConfig(2, 2, pruning_head=True, **options))


def states(model, inputs):
    """Input of the last twig layer, per-token inputs and visual mask of a prompt."""
    captured = model.base.prompt(**inputs)
    tokens, masks = model.base.token_inputs(captured), model.base.masks()
    hidden = model.base.run_layers(captured.hidden, 0, 2, tokens, masks)
    return model.twig.last_input(hidden, tokens, masks), tokens, captured.visual_mask


def reference(model, hidden, tokens, visual, query):
    """Eq. 7, head by head and token by token."""
    layer, head = model.twig.layers[-1], model.twig.pruning_head
    attention, x = layer.self_attn, layer.input_layernorm(hidden)[0]
    heads, kv_heads, size = 4, 2, attention.head_dim
    queries = rotate(attention.q_proj(x).view(1, -1, heads, size).transpose(1, 2), tokens.cos, tokens.sin)[0]
    keys = rotate(attention.k_proj(x).view(1, -1, kv_heads, size).transpose(1, 2), tokens.cos, tokens.sin)[0]
    total = torch.zeros(len(visual))
    for h in range(heads):
        rows = slice(h * size, (h + 1) * size)
        logits = []
        for key in visual:
            z_query, z_key = head.query_gate.weight[rows] @ x[query], head.key_gate.weight[rows] @ x[key]
            gates = z_query.clamp(min=0) * z_query.sigmoid() * z_key.clamp(min=0) * z_key.sigmoid()
            logits.append((gates * queries[h, query] * keys[h // 2, key]).sum() / sqrt(size))
        total += torch.stack(logits).softmax(dim=0) / heads
    return total


@torch.no_grad()
def test_it_is_equation_7():
    model = grown()
    hidden, tokens, mask = states(model, prompt())
    asking = torch.zeros_like(mask)
    asking[0, [10, 21, 24]] = True  # the first stands between the visual tokens and sees seven of them
    visual_query = VisualQuery.at(asking, mask)
    scores = log_visual_attention(model.twig.layers[-1], hidden, tokens, visual_query, model.twig.pruning_head)[0].exp()
    for row, (query, count) in enumerate([(10, 7), (21, 16), (24, 16)]):
        expected = reference(model, hidden, tokens, range(3, 3 + count), query)
        torch.testing.assert_close(scores[row, :count], expected)
        assert not scores[row, count:].any()
        assert expected.std() > 1e-3


@torch.no_grad()
def test_without_gates_it_is_the_layers_attention():
    model = grown()
    hidden, tokens, mask = states(model, prompt())
    keys = torch.randn(1, 2, 25, 8)
    visual_query = VisualQuery.at(torch.arange(25)[None] == 24, mask)
    attention = log_visual_attention(model.twig.layers[-1], hidden, tokens, visual_query, keys=keys)[0, 0].exp()
    queries = rotate(
        model.twig.layers[-1]
        .self_attn.q_proj(model.twig.layers[-1].input_layernorm(hidden))
        .view(1, 25, 4, 8)
        .transpose(1, 2),
        *tokens.rotary(None),
    )[0, :, 24]
    expected = torch.stack([(keys[0, h // 2, 3:19] @ queries[h] / sqrt(8)).softmax(dim=0) for h in range(4)]).mean(
        dim=0
    )
    torch.testing.assert_close(attention, expected)


@torch.no_grad()
def test_it_ranks_by_default():
    model = grown()
    options = {"max_new_tokens": 1, "keep": 5, "return_dict_in_generate": True}
    own = model.generate(**prompt(), **options).kept_indices[0]
    hidden, tokens, _ = states(model, prompt())
    best = reference(model, hidden, tokens, range(3, 19), 24).topk(5).indices + 3
    assert own.tolist() == sorted(best.tolist())
    assert torch.equal(own, model.generate(**prompt(), **options, scorer=HeadScores()).kept_indices[0])
    assert not torch.equal(own, model.generate(**prompt(), **options, scorer=TwigAttention()).kept_indices[0])


def test_speculation_goes_on_with_it():
    model = grown()
    options = {"max_new_tokens": 10, "keep": 5}
    assert torch.equal(model.generate(**prompt(), **options), model.generate(**prompt(), **options, speculate="chain"))


def test_a_fresh_one_learns_from_the_first_step():
    model = grown()
    hidden, tokens, mask = states(model, prompt())
    visual_query = VisualQuery.at(torch.arange(25)[None] == 24, mask)
    log_visual_attention(model.twig.layers[-1], hidden, tokens, visual_query, model.twig.pruning_head)[
        0, 0, 0
    ].backward()
    for linear in (model.twig.pruning_head.query_gate, model.twig.pruning_head.key_gate):
        rows = linear.weight.grad.abs().amax(dim=1)
        assert (rows > 0).float().mean() > 0.3


@torch.no_grad()
def test_most_gates_open_to_tokens_like_those_seen_and_some_to_their_opposite():
    torch.manual_seed(0)
    head = PruningHead(64, 64)
    tokens = 3.0 + torch.randn(50, 64)
    head.open(tokens)
    for linear in (head.query_gate, head.key_gate):
        assert (linear(tokens) > 0).float().mean() > 0.8
        assert 0.02 < (linear(-tokens) > 0).float().mean() < 0.2


def test_rows_without_a_visible_token_have_no_share_and_no_nan():
    queries = torch.randn(2, 4, 1, 8, requires_grad=True)
    visible = torch.tensor([[[True, True, False]], [[False, False, False]]])
    shares = visual_attention(queries, torch.randn(2, 2, 3, 8), 0.35, visible)
    assert shares[1].exp().sum() == 0
    assert shares[0, 0, 2] == float("-inf")
    torch.testing.assert_close(shares[0].exp().sum(), torch.tensor(1.0))
    shares[0, 0, 0].backward()
    assert torch.isfinite(queries.grad).all()
    assert queries.grad[0].any()
    assert visual_attention(queries, torch.randn(2, 2, 0, 8), 0.35, visible[:, :, :0]).shape == (2, 1, 0)


def test_rows_may_differ_in_their_visual_tokens():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    asking = torch.tensor([[0, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    visual_query = VisualQuery.at(asking, mask)
    assert visual_query.visual[0].tolist() == [1, 2, 4]
    assert visual_query.queries[0].tolist() == [3, 5]
    assert visual_query.visible[0].tolist() == [[True, True, False], [True, True, True]]
    assert visual_query.visible[1].sum() == 1
    assert not visual_query.visible[2].any()


def test_a_twig_without_one_has_none_of_its_weights():
    plain = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2)).twig
    assert plain.pruning_head is None
    assert not [name for name in plain.state_dict() if "pruning" in name]
