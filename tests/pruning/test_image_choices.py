"""What each method chooses among an image's tokens, against a reference that makes every table and loops over every token."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from tests.pruning.image_tokens import SIZES, WIDTH, of
from twigvlm.pruning.images import shares
from twigvlm.pruning.methods.cdpruner import CDPruner
from twigvlm.pruning.methods.divprune import DivPrune
from twigvlm.pruning.methods.fastervlm import FasterVLM
from twigvlm.pruning.methods.holov import HoloV
from twigvlm.pruning.methods.prumerge import PruMerge
from twigvlm.pruning.methods.prunesid import PruneSID, quotas
from twigvlm.pruning.methods.scope import Scope
from twigvlm.pruning.methods.visionzip import VisionZip
from twigvlm.pruning.methods.vispruner import VisPruner


def cosines(rows, others):
    return cosine_similarity(rows[:, None], others[None], dim=-1)


@given(SIZES)
def test_fastervlm(size):
    tokens, keep = of(*size)
    best = sorted(range(len(tokens)), key=lambda j: -float(tokens.importance[j]))[:keep]
    assert FasterVLM().pick(tokens, keep).indices.tolist() == sorted(best)


@given(SIZES, st.booleans())
def test_visionzip(size, has_cls):
    tokens, keep = of(*size, cls=has_cls)
    indices, states = VisionZip().pick(tokens, keep)
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
    assert indices.tolist()[cls:] == [*dominant, *targets]
    assert len(set(indices.tolist())) == keep


@given(SIZES)
def test_divprune(size):
    tokens, keep = of(*size)
    distance = 1 - cosines(tokens.projected, tokens.projected)
    distance.fill_diagonal_(9.0)
    chosen = [int(distance.min(1).values.argmax())]
    while len(chosen) < keep:
        left = [j for j in range(len(tokens)) if j not in chosen]
        chosen.append(max(left, key=lambda j: min(float(distance[j, i]) for i in chosen)))
    assert DivPrune().pick(tokens, keep).indices.tolist() == sorted(chosen)


@given(SIZES)
def test_scope(size):
    tokens, keep = of(*size)
    similar, chosen = cosines(tokens.features, tokens.features), []
    best = torch.zeros(len(tokens))
    while len(chosen) < keep:
        left = [j for j in range(len(tokens)) if j not in chosen]
        chosen.append(max(left, key=lambda j: float((similar[j] - best).clamp(min=0).sum() * tokens.importance[j])))
        best = torch.maximum(best, similar[chosen[-1]])
    assert Scope().pick(tokens, keep).indices.tolist() == sorted(chosen)


@given(SIZES)
def test_vispruner(size):
    tokens, keep = of(*size)
    order = sorted(range(len(tokens)), key=lambda j: -float(tokens.importance[j]))
    important, pool = order[: keep // 2], order[keep // 2 :]
    while len(pool) > keep - keep // 2:
        even, odd = pool[::2], pool[1::2]
        similar = cosines(tokens.features[even], tokens.features[odd]).max(1).values
        count = min(8, len(pool) - (keep - keep // 2), len(even))
        pool = [even[i] for i in sorted(range(len(even)), key=lambda i: -float(similar[i]))[count:]] + odd
    assert VisPruner().pick(tokens, keep).indices.tolist() == sorted([*important, *pool])


@given(SIZES)
def test_prumerge(size):
    tokens, keep = of(*size)
    indices, states = PruMerge(neighbours=4).pick(tokens, keep)
    attention, features = tokens.vision.single_head[tokens.rows], tokens.features
    keys = tokens.vision.last_keys[tokens.rows]
    attended = min(keep - 1, int((keep - 1) / 4 + 0.5))
    order = sorted(range(len(tokens)), key=lambda j: -float(attention[j]))[:attended]
    others = [j for j in range(len(tokens)) if j not in order]
    spaced = keep - 1 - attended
    centers = [*order, *(others[i * len(others) // spaced] for i in range(spaced))]
    gone = [j for j in range(len(tokens)) if j not in centers]
    expected = []
    for center in centers:
        rest = [j for j in range(len(tokens)) if j != center]
        near = sorted(rest, key=lambda j: -float(cosines(keys[[center]], keys[[j]])))[:4]
        expected.append(features[center] + sum(attention[j] * features[j] for j in near))
    expected.append(sum(attention[j] * features[j] for j in gone))
    torch.testing.assert_close(states, tokens.vision.project(torch.stack(expected)), rtol=1e-4, atol=1e-4)
    assert indices.tolist() == [*centers, gone[0]]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(0, 1))
def test_a_budget_is_split_in_proportion(sizes, share):
    keep = int(share * sum(sizes))
    split = shares(keep, sizes)
    assert sum(split) == keep
    assert all(0 <= part <= size for part, size in zip(split, sizes, strict=True))
    assert all(abs(part - keep * size / max(sum(sizes), 1)) < 1 for part, size in zip(split, sizes, strict=True))


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
    assert CDPruner().pick(tokens, keep).indices.tolist() == sorted(chosen)


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
    indices, states = HoloV().pick(tokens, keep)
    assert indices.tolist() == [j for part in chosen for j in part]
    assert torch.equal(states, tokens.projected[indices])


@given(SIZES, st.sampled_from([0.0, 1.0, 2.0]))
def test_prunesid(size, shared):
    """Where features differ, and where many are so alike that it matters how alike two of them may be."""
    tokens, keep = of(*size, shared=shared)
    indices, states = PruneSID().pick(tokens, keep)
    patches = indices[keep > 1 :].tolist()
    assert len(set(indices.tolist())) == keep
    kept = tokens.features[patches] if keep == 1 else torch.cat((tokens.cls, tokens.features[patches]))
    torch.testing.assert_close(states, tokens.projected[patches] if keep == 1 else tokens.vision.project(kept))
    variables = tokens.features.sigmoid().T
    variables = variables - variables.mean(0)
    _, vectors = torch.linalg.eigh((variables.T @ variables).double())
    loadings = vectors.flip(1)[:, : max(1, keep // 4)].abs()
    group = loadings.argmax(1)
    cosine = cosines(tokens.features, tokens.features)
    most = keep / 32 * cosine.triu(1).sum() / (len(tokens) * (len(tokens) - 1) / 2)
    assume(bool(((cosine - most).abs() > 1e-5).all()))  # rounding decides about the others
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
    assert quotas([9, 9, 9], [4, 2, 2], 9, True) == [3, 3, 2]
    assert quotas([9, 1, 9], [9, 1, 2], 9, False) == [6, 1, 2]
    assert quotas([20, 1, 1], [1, 1, 1], 11, True) == [8, 1, 1]
    # What is left goes to the group with the most tokens that resemble no other and then the next, not to the largest.
    assert quotas([4, 4, 6], [2, 1, 1], 11, False) == [4, 4, 3]
    assert quotas([4, 4, 6], [2, 1, 1], 12, True) == [4, 4, 3]
    assert quotas([4, 4, 9], [1, 2, 6], 13, False) == [2, 4, 7]
