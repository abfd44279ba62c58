"""What methods choose that cut between layers, against a reference that makes every table and loops over every token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.families import prompt, tiny
from tests.pruning.image_tokens import SIZES, WIDTH
from tests.pruning.references import peaks
from twigvlm import TwigConfig, TwigVLM
from twigvlm.base.layers import project_keys
from twigvlm.base.token_inputs import rotate
from twigvlm.base.vlm import BaseVLM
from twigvlm.pruning.methods import make_pruner
from twigvlm.pruning.methods.dart import least_similar
from twigvlm.pruning.methods.density_peaks import density_peaks
from twigvlm.pruning.methods.fitprune import attention_received
from twigvlm.pruning.methods.pruning_head import VisualQuery, log_visual_attention
from twigvlm.pruning.methods.sparsevlm import SparseVLM, distance_kernel, raters, recycling
from twigvlm.pruning.methods.twig_attention import layer_scores
from twigvlm.pruning.question import attention_from, question_mask
from twigvlm.pruning.view import CutView, Tokens


def least_like_pivots(states, norms, visual, text, keep):
    """DART's choice: states of length 1, norms of keys, and the indices of visual tokens and of the question."""
    kept = sorted(visual, key=lambda j: -float(norms[j]))[: min(4, keep)]
    pivots = [*kept, *sorted(text, key=lambda j: -float(norms[j]))[:4]]
    chosen = list(kept)
    for place, pivot in enumerate(pivots):
        quota = (keep - len(kept)) // len(pivots) + (place < (keep - len(kept)) % len(pivots))
        pool = [j for j in visual if j not in chosen]
        chosen += sorted(pool, key=lambda j: float(states[j] @ states[pivot]))[:quota]
    return sorted(chosen)


@given(SIZES)
def test_dart(size):
    seed, count, share = size
    generator = torch.Generator().manual_seed(seed)
    states = torch.nn.functional.normalize(torch.randn(count + 6, WIDTH, generator=generator), dim=-1)
    norms, keep = torch.rand(count + 6, generator=generator), max(1, int(share * count))
    visual, text = list(range(count)), list(range(count, count + 6))
    got = least_similar(states, norms, torch.tensor(visual), torch.tensor(text), keep)
    assert sorted(got.tolist()) == least_like_pivots(states, norms, visual, text, keep)


@torch.no_grad()
def test_dart_compares_states_after_the_final_norm():
    """From what the base makes eagerly; its final norm stretches some directions of a state and shrinks others."""
    model = TwigVLM.grow(tiny("llava", "eager"), TwigConfig(2, 2))
    model.base.norm.weight.mul_(torch.linspace(-2, 2, 32).exp())
    inputs = prompt(model.model, "llava", "images")
    keys = []
    hook = model.base.layers[1].self_attn.k_proj.register_forward_hook(lambda *call: keys.append(call[2]))
    states = model.model(**inputs, output_hidden_states=True).hidden_states[2]
    hook.remove()
    rotary = model.base.token_inputs(model.base.prompt(**inputs))
    rotated = rotate(keys[0].unflatten(-1, (2, -1)).transpose(1, 2), rotary.cos, rotary.sin)
    norms = rotated[0].abs().sum((0, 2))
    visual = model.base.visual_mask(inputs["input_ids"])[0].nonzero()[:, 0].tolist()
    question, keep = range(visual[-1] + 1, inputs["input_ids"].shape[1]), 14
    raw, normed = (torch.nn.functional.normalize(each[0], dim=-1) for each in (states, model.base.norm(states)))
    expected = least_like_pivots(normed, norms, visual, question, keep)
    assert least_like_pivots(raw, norms, visual, question, keep) != expected  # the norm matters in this model
    options = {"pruner": "dart", "retain": (2 * len(visual) + 4 * keep) / 6, "max_new_tokens": 1}
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert output.kept_indices[0].tolist() == expected


@given(SIZES)
def test_density_peaks(size):
    seed, count, share = size
    states = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    clusters = max(1, int(share * count / 3))
    centers, cluster = density_peaks(states, clusters)
    if clusters > 1:  # of one cluster all densities are the same: that of a token itself
        assert (centers.tolist(), cluster.tolist()) == peaks(states, clusters)
    else:
        assert cluster.tolist() == [0] * count


@given(st.integers(2, 600), st.data())
def test_recycling_fills_the_budget(visual, data):
    keep = data.draw(st.integers(1, visual))
    count, clusters = recycling(visual, keep)
    assert count + clusters == keep
    if clusters:
        assert clusters == (int((visual - count) * 0.3) + 1) // 10 + 1
    assert (clusters == 0) == (visual == keep or count == keep)


def test_recycling_as_published():
    assert [recycling(*sizes) for sizes in ((576, 309), (309, 204), (204, 113))] == [(300, 9), (200, 4), (110, 3)]


@torch.no_grad()
def test_raters_and_the_kernel_of_distances():
    base = BaseVLM(tiny("llava"))
    captured = base.prompt(**prompt(base.model, "llava", "images"))
    chosen = raters(captured)[0]
    last = int(captured.visual_mask[0].nonzero()[-1])
    text = captured.hidden[0, last + 1 :]
    given = (captured.hidden[0, captured.visual_mask[0]] @ text.T).softmax(-1).mean(0)
    assert chosen.nonzero()[:, 0].tolist() == [last + 1 + j for j in range(len(text)) if given[j] > given.mean()]
    rotary = base.token_inputs(captured)
    kernel = distance_kernel((rotary.cos, rotary.sin), (rotary.cos, rotary.sin))[0]
    ones = rotate(torch.ones(1, 1, 1, 8), rotary.cos[:, 5:6], rotary.sin[:, 5:6])
    others = rotate(torch.ones(1, 1, 1, 8), rotary.cos[:, 2:3], rotary.sin[:, 2:3])
    torch.testing.assert_close(kernel[5, 2], ((ones * others).sum() / 8).clamp(min=0.05))
    torch.testing.assert_close(kernel.diagonal(), torch.ones(len(kernel)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm-v2", "mustdrop"])
def test_first_cut_is_by_the_base_s_own_attention(name):
    """What stays behind the first cut, from the maps that the base makes eagerly."""
    model = TwigVLM.grow(tiny("llava", "eager"), TwigConfig(2, 2))
    inputs = prompt(model.model, "llava", "images")
    maps = model.model(**inputs, output_attentions=True).attentions
    base, pruner = model.base, make_pruner(name)
    with base.watch_vision() as watch:
        captured = base.prompt(**inputs, vision=watch)
    visual = captured.visual_mask[0].nonzero()[:, 0]
    first = pruner.cuts(20, len(visual), 6)[0]
    before, after = maps[first.layer - 1][0], maps[first.layer][0]
    question = list(range(int(visual[-1]) + 1, captured.hidden.shape[1]))
    if name == "fastv":
        scores = before[:, -1].mean(0)
    elif name == "pyramiddrop":
        scores = after[:, -1].mean(0)
    elif name == "sparsevlm-v2":
        asking = raters(captured)[0].nonzero()[:, 0]
        rotary = base.token_inputs(captured)
        kernel = distance_kernel((rotary.cos, rotary.sin), (rotary.cos, rotary.sin))[0]
        rows = before[:, asking] / kernel[asking]
        heads = rows[:, :, visual].sum((1, 2)).topk(2).indices
        scores = rows[heads].mean(0).sum(0)
    else:
        rows = before[:, question].mean(0)
        total, largest = rows.sum(0), rows.max(0).values
        scores = torch.maximum(total / total[visual].sum(), largest)
        scores[visual[captured.vision.last_importance.topk(3).indices]] += 9  # 8 % of 32, rounded up
    expected = visual[scores[visual].topk(first.keep).indices].sort().values
    output = model.generate(**inputs, pruner=name, retain=20, max_new_tokens=1, return_dict_in_generate=True)
    assert output.kept_indices[0].tolist() == expected.tolist()


def gemma3():
    """A base with windows and with rotary embeddings of two kinds, and the tokens of a prompt before its first layer."""
    base = BaseVLM(tiny("gemma3", "eager"))
    captured = base.prompt(**prompt(base.model, "gemma3", "images"))
    return base, captured, Tokens(captured.hidden, base.token_inputs(captured), captured.visual_mask, captured.lengths)


def run_last(base, tokens, layer):
    """The tokens after a layer, and the attention map that it made of them."""
    maps = []
    hook = base.layers[layer - 1].self_attn.register_forward_hook(lambda *call: maps.append(call[2][1]))
    after = tokens.through(base, layer - 1, layer, base.masks(), None, keep_last_input=True)
    hook.remove()
    return after, maps[-1]


@torch.no_grad()
@pytest.mark.parametrize("layer", [2, 3], ids=["sees-all", "has-a-window"])
def test_later_cuts_are_by_the_base_s_own_attention(layer):
    """After a cut a window still measures in the unpruned sequence: what a layer cannot see has no score in it."""
    base, captured, tokens = gemma3()
    visual, masks, last = captured.visual_mask, base.masks(), base.layers[layer - 1]
    tokens = tokens.through(base, 0, 1, masks, None).keep(~visual | (visual.cumsum(1) % 4 == 0))
    tokens = tokens.through(base, 1, layer - 1, masks, None)
    after, attention = run_last(base, tokens, layer)
    asking = question_mask(captured)
    (rows,) = attention_from(CutView(base, captured, layer, after, None), asking)
    torch.testing.assert_close(rows.shares, attention[:, :, asking.gather(1, after.index)[0]])
    scores = layer_scores(last, tokens.hidden, project_keys(last, tokens.hidden, tokens.inputs), tokens, "last")
    torch.testing.assert_close(scores, attention[:, :, -1].mean(1) * tokens.visual)
    far = (after.index[0, -1] - after.index[0] >= 9) & tokens.visual[0]
    assert far.any()
    assert bool(scores[0, far].any()) == (layer == 2)


@torch.no_grad()
@pytest.mark.parametrize("layer", [2, 3], ids=["sees-all", "has-a-window"])
@pytest.mark.parametrize("pruned", [False, True])
def test_visual_tokens_attend_to_all_of_their_image(layer, pruned):
    """FitPrune's visual queries see what they see in the base: the tokens of their image that come after them too."""
    base, captured, tokens = gemma3()
    visual, masks = captured.visual_mask, base.masks()
    tokens = tokens.through(base, 0, 1, masks, None)
    if pruned:
        tokens = tokens.keep(~visual | (visual.cumsum(1) % 2 == 0))
    after, attention = run_last(base, tokens.through(base, 1, layer - 1, masks, None), layer)
    asking = after.visual[0].nonzero()[:, 0]
    rows = attention[0].amax(0)[asking]
    assert bool((rows[:, asking].triu(1) > 0).any())  # beyond what is causal
    of_visual, _ = attention_received(CutView(base, captured, layer, after, None))
    torch.testing.assert_close(of_visual[0], rows.mean(0) * after.visual[0])


@torch.no_grad()
@pytest.mark.parametrize("layer", [2, 3], ids=["sees-all", "has-a-window"])
def test_attention_restricted_to_visual_tokens_is_the_base_s_own(layer):
    """A window ends where the base's ends: some text behind an image sees a part of it."""
    base, captured, tokens = gemma3()
    tokens = tokens.through(base, 0, layer - 1, base.masks(), None)
    _, attention = run_last(base, tokens, layer)
    visual, text = captured.visual_mask, ~captured.visual_mask
    query = VisualQuery.at(text, visual)
    got = log_visual_attention(base.layers[layer - 1], tokens.hidden, tokens.inputs, query)[0].exp()
    seen = attention[0][:, text[0]][:, :, visual[0]]
    torch.testing.assert_close(got, (seen / seen.sum(-1, keepdim=True).clamp(min=1e-30)).mean(0))
    assert bool(((got > 0) < query.visible[0]).any()) == (layer == 3)


@torch.no_grad()
def test_the_kernel_of_distances_is_that_of_the_layer():
    base, captured, tokens = gemma3()
    after, attention = run_last(base, tokens.through(base, 0, 1, base.masks(), None), 2)
    visual, asking = captured.visual_mask[0].nonzero()[:, 0], raters(captured)[0].nonzero()[:, 0]
    rotary = tokens.inputs.rotary("full_attention")
    kernel = distance_kernel(rotary, rotary)[0]
    torch.testing.assert_close(kernel.diagonal(), torch.ones(len(kernel)))
    rows = attention[0][:, asking] / kernel[asking]
    heads = rows[:, :, visual].sum((1, 2)).topk(2).indices
    ranked = visual[rows[heads].mean(0).sum(0)[visual].argsort(descending=True)]
    view = CutView(base, captured, 2, after, None)
    for keep in range(1, len(visual)):
        stays = SparseVLM("v2").choose(view, [keep]).stays
        assert stays[0].nonzero()[:, 0].tolist() == ranked[:keep].sort().values.tolist()
