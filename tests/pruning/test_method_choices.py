"""What each method chooses, against a plain reference that makes every table and loops over every token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from tests.families import prompt, tiny
from twigvlm import TwigConfig, TwigVLM
from twigvlm.base.token_inputs import rotate
from twigvlm.base.vision import Vision
from twigvlm.base.vlm import BaseVLM
from twigvlm.pruning.images import ImageTokens, shares
from twigvlm.pruning.methods import make_pruner
from twigvlm.pruning.methods.cdpruner import CDPruner
from twigvlm.pruning.methods.dart import least_similar
from twigvlm.pruning.methods.density_peaks import density_peaks
from twigvlm.pruning.methods.divprune import DivPrune
from twigvlm.pruning.methods.fastervlm import FasterVLM
from twigvlm.pruning.methods.holov import HoloV
from twigvlm.pruning.methods.prumerge import PruMerge
from twigvlm.pruning.methods.prunesid import PruneSID, quotas
from twigvlm.pruning.methods.scope import Scope
from twigvlm.pruning.methods.sparsevlm import distance_kernel, raters, recycling
from twigvlm.pruning.methods.visionzip import VisionZip
from twigvlm.pruning.methods.vispruner import VisPruner

SIZES = st.tuples(st.integers(0, 10**6), st.integers(5, 40), st.floats(0.05, 0.95))
WIDTH = 12


class Projection(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, states):
        return (states @ self.weight).tanh()


def image(seed, count, cls=True, width=WIDTH):
    """An image of random tokens, in the middle of two others."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    total, weight = 3 * count, random(width, width)
    numbers = torch.arange(3).repeat_interleave(count)
    vision = Vision(
        torch.arange(total)[None],
        random(total, width),
        numbers,
        random(total, width),
        Projection(weight),
        None,
        None,
        1,
        cls,
        random(3, width) if cls else None,
    )
    importance = random(total).softmax(0)
    vision._importance.update(mean=importance, sum=4 * importance)
    for name, value in (
        ("keys", random(total, width)),
        ("last_keys", random(total, width)),
        ("single_head", importance),
    ):
        vision.__dict__[name] = value  # as `cached_property` does
    return ImageTokens(vision, torch.arange(count, 2 * count), random(5, width))


def of(seed, count, share, **options):
    return image(seed, count, **options), max(1, min(count - 1, int(share * count)))


def cosines(rows, others):
    return cosine_similarity(rows[:, None], others[None], dim=-1)


@given(SIZES)
def test_fastervlm(size):
    tokens, keep = of(*size)
    best = sorted(range(len(tokens)), key=lambda j: -float(tokens.importance[j]))[:keep]
    assert FasterVLM().pick(tokens, keep).slots.tolist() == sorted(best)


@given(SIZES, st.booleans())
def test_visionzip(size, has_cls):
    tokens, keep = of(*size, cls=has_cls)
    slots, states = VisionZip().pick(tokens, keep)
    contextual = min(int(keep * 5 / 32 + 0.5), keep - 1)
    cls = has_cls and keep - contextual >= 2
    order = sorted(range(len(tokens)), key=lambda j: -float(tokens.importance[j]))
    dominant = sorted(order[: keep - contextual - cls])
    rest = [j for j in range(len(tokens)) if j not in dominant]
    targets = rest[:: len(rest) // contextual][:contextual] if contextual else []
    merged = {j: [] for j in targets}
    for j in set(rest) - set(targets) if targets else ():
        similar = cosines(tokens.keys[j : j + 1], tokens.keys[targets])[0]
        merged[targets[int(similar.argmax())]].append(tokens.features[j])
    expected = [tokens.cls[0]] if cls else []
    expected += [tokens.features[j] for j in dominant]
    expected += [tokens.features[j] + (torch.stack(others).mean(0) if others else 0) for j, others in merged.items()]
    torch.testing.assert_close(states, tokens.vision.project(torch.stack(expected)), rtol=1e-4, atol=1e-4)
    assert slots.tolist()[cls:] == [*dominant, *targets]
    assert len(set(slots.tolist())) == keep


@given(SIZES)
def test_divprune(size):
    tokens, keep = of(*size)
    distance = 1 - cosines(tokens.projected, tokens.projected)
    distance.fill_diagonal_(9.0)
    chosen = [int(distance.min(1).values.argmax())]
    while len(chosen) < keep:
        left = [j for j in range(len(tokens)) if j not in chosen]
        chosen.append(max(left, key=lambda j: min(float(distance[j, i]) for i in chosen)))
    assert DivPrune().pick(tokens, keep).slots.tolist() == sorted(chosen)


@given(SIZES)
def test_scope(size):
    tokens, keep = of(*size)
    similar, chosen = cosines(tokens.features, tokens.features), []
    best = torch.zeros(len(tokens))
    while len(chosen) < keep:
        left = [j for j in range(len(tokens)) if j not in chosen]
        chosen.append(max(left, key=lambda j: float((similar[j] - best).clamp(min=0).sum() * tokens.importance[j])))
        best = torch.maximum(best, similar[chosen[-1]])
    assert Scope().pick(tokens, keep).slots.tolist() == sorted(chosen)


@given(SIZES)
def test_vispruner(size):
    tokens, keep = of(*size)
    order = sorted(range(len(tokens)), key=lambda j: -float(tokens.importance[j]))
    important, pool = order[: keep // 2], order[keep // 2 :]
    while len(pool) > keep - keep // 2:
        even, odd = pool[::2], pool[1::2]
        similar = cosines(tokens.features[even], tokens.features[odd]).max(1).values
        count = min(8, len(pool) - (keep - keep // 2), len(even))
        gone = {even[i] for i in sorted(range(len(even)), key=lambda i: -float(similar[i]))[:count]}
        pool = [j for j in pool if j not in gone]
    assert VisPruner().pick(tokens, keep).slots.tolist() == sorted([*important, *pool])


@given(SIZES)
def test_prumerge(size):
    tokens, keep = of(*size)
    slots, states = PruMerge(neighbours=4).pick(tokens, keep)
    attention, features = tokens.vision.single_head[tokens.rows], tokens.features
    keys = tokens.vision.last_keys[tokens.rows]
    attended = min(keep - 1, int((keep - 1) / 4 + 0.5))
    order = sorted(range(len(tokens)), key=lambda j: -float(attention[j]))[:attended]
    others = [j for j in range(len(tokens)) if j not in order]
    spaced = keep - 1 - attended
    centers = sorted([*order, *(others[i * len(others) // spaced] for i in range(spaced))])
    gone = [j for j in range(len(tokens)) if j not in centers]
    expected = []
    for center in centers:
        near = sorted(gone, key=lambda j: -float(cosines(keys[[center]], keys[[j]])))[:4]
        expected.append(features[center] + sum(attention[j] * features[j] for j in near))
    expected.append(sum(attention[j] * features[j] for j in gone))
    torch.testing.assert_close(states, tokens.vision.project(torch.stack(expected)), rtol=1e-4, atol=1e-4)
    assert slots.tolist() == [*centers, gone[0]]


@given(SIZES)
def test_dart(size):
    seed, count, share = size
    generator = torch.Generator().manual_seed(seed)
    states = torch.nn.functional.normalize(torch.randn(count + 6, WIDTH, generator=generator), dim=-1)
    norms, keep = torch.rand(count + 6, generator=generator), max(1, int(share * count))
    visual, text = list(range(count)), list(range(count, count + 6))
    kept = sorted(visual, key=lambda j: -float(norms[j]))[: min(4, keep)]
    pivots = [*kept, *sorted(text, key=lambda j: -float(norms[j]))[:4]]
    chosen = list(kept)
    for place, pivot in enumerate(pivots):
        quota = (keep - len(kept)) // len(pivots) + (place < (keep - len(kept)) % len(pivots))
        pool = [j for j in visual if j not in chosen]
        chosen += sorted(pool, key=lambda j: float(states[j] @ states[pivot]))[:quota]
    got = least_similar(states, norms, torch.tensor(visual), torch.tensor(text), keep)
    assert sorted(got.tolist()) == sorted(chosen)


@given(SIZES)
def test_density_peaks(size):
    seed, count, share = size
    states = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    clusters = max(1, int(share * count / 3))
    distance = torch.cdist(states, states) / WIDTH**0.5
    density = [float((-row.sort().values[:clusters].square().mean()).exp()) for row in distance]
    gaps = []
    for j in range(count):
        denser = [float(distance[j, i]) for i in range(count) if density[i] > density[j]]
        gaps.append(min(denser) if denser else float(distance[j].max()))
    expected = sorted(range(count), key=lambda j: -density[j] * gaps[j])[:clusters]
    centers, cluster = density_peaks(states, clusters)
    if clusters > 1:  # of one cluster all densities are the same: that of a token itself
        assert centers.tolist() == expected
    for j in range(count):
        nearest = int(distance[j, centers].argmin())
        assert cluster[j] == (centers.tolist().index(j) if j in centers else nearest)


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


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(0, 1))
def test_a_budget_is_split_in_proportion(sizes, share):
    keep = int(share * sum(sizes))
    split = shares(keep, sizes)
    assert sum(split) == keep
    assert all(0 <= part <= size for part, size in zip(split, sizes, strict=True))
    assert all(abs(part - keep * size / max(sum(sizes), 1)) < 1 for part, size in zip(split, sizes, strict=True))


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
        rows = before[:, asking]
        heads = rows[:, :, visual].sum((1, 2)).topk(2).indices
        rotary = base.token_inputs(captured)
        kernel = distance_kernel((rotary.cos, rotary.sin), (rotary.cos, rotary.sin))[0]
        scores = (rows[heads] / kernel[asking]).mean(0).sum(0)
    else:
        rows = before[:, question].mean(0)
        total, largest = rows.sum(0), rows.max(0).values
        scores = torch.maximum(total / total[visual].sum(), largest)
        scores[visual[captured.vision.last_importance.topk(2).indices]] += 9  # 8 % of 32
    expected = visual[scores[visual].topk(first.keep).indices].sort().values
    output = model.generate(**inputs, pruner=name, retain=20, max_new_tokens=1, return_dict_in_generate=True)
    assert output.kept_indices[0].tolist() == expected.tolist()


@given(SIZES)
def test_cdpruner(size):
    tokens, keep = of(*size)
    keep = min(keep, WIDTH - 2)  # of more vectors than dimensions every determinant is 0
    relevance = cosines(tokens.projected, tokens.question).mean(1)
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    kernel = (cosines(tokens.projected, tokens.projected) * relevance[:, None] * relevance).double()
    chosen = []
    while len(chosen) < keep:
        left = [j for j in range(len(tokens)) if j not in chosen]
        chosen.append(max(left, key=lambda j: float(torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]]))))
    assert CDPruner().pick(tokens, keep).slots.tolist() == sorted(chosen)


@given(SIZES)
def test_holov(size):
    tokens, keep = of(*size)
    attention = tokens.importance
    segments = [part.tolist() for part in torch.arange(len(tokens)).tensor_split(min(16, len(tokens)))]
    similar, scores = cosines(tokens.projected, tokens.projected), []
    for segment in segments:
        others = similar[segment][:, segment] * (1 - torch.eye(len(segment)))
        mean = others.sum(1, keepdim=True) / max(1, len(segment) - 1)
        variance = (others - mean).square().sum(1) / max(1, len(segment) - 1)
        scaled = 1000 * attention[segment]
        variance = variance * scaled.mean() / variance.mean() if len(segment) > 1 else scaled
        scores.append(float((scaled + 0.09 * variance).mean()))
    order = sorted(range(len(segments)), key=lambda j: -scores[j])
    quota = [int(keep * score / sum(scores)) for score in scores]
    for j in order[: keep - sum(quota)]:
        quota[j] += 1
    quota = [min(count, len(segment)) for count, segment in zip(quota, segments, strict=True)]
    for j in order:
        quota[j] += min(keep - sum(quota), len(segments[j]) - quota[j])
    chosen = [sorted(part, key=lambda j: -float(attention[j]))[:n] for part, n in zip(segments, quota, strict=True)]
    assert HoloV().pick(tokens, keep).slots.tolist() == sorted(j for part in chosen for j in part)


@given(SIZES)
def test_prunesid(size):
    tokens, keep = of(*size)
    slots, states = PruneSID().pick(tokens, keep)
    patches = slots[keep > 1 :].tolist()
    assert len(set(slots.tolist())) == keep
    kept = tokens.features[patches] if keep == 1 else torch.cat((tokens.cls, tokens.features[patches]))
    torch.testing.assert_close(states, tokens.projected[patches] if keep == 1 else tokens.vision.project(kept))
    variables = tokens.features.sigmoid().T
    variables = variables - variables.mean(0)
    _, vectors = torch.linalg.eigh((variables.T @ variables).double())
    loadings = vectors.flip(1)[:, : max(1, keep // 4)].abs()
    group = loadings.argmax(1)
    cosine = cosines(tokens.features, tokens.features)
    most = keep / 32 * cosine.triu(1).sum() / (len(tokens) * (len(tokens) - 1) / 2)
    for index in group.unique().tolist():
        order = sorted((group == index).nonzero()[:, 0].tolist(), key=lambda j: -float(tokens.importance[j]))
        different = []
        for j in order:
            if all(cosine[j, other] <= most for other in different):
                different.append(j)
        ranked = different + [j for j in order if j not in different]
        of_group = [j for j in patches if group[j] == index]
        assert of_group == ranked[: len(of_group)]
        assert of_group


def test_quotas_of_groups():
    assert quotas([9, 9, 9], [4, 2, 2], 9, True) == [4, 2, 2]
    assert quotas([9, 1, 9], [9, 1, 2], 9, False) == [6, 1, 2]
    assert quotas([20, 1, 1], [1, 1, 1], 11, True) == [8, 1, 1]
