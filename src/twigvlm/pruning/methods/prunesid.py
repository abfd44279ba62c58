"""PruneSID: groups of patches by their main components, and in each the important ones that differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.pruning.cut import Need
from twigvlm.pruning.images import ImageTokens, PerImage, Picked
from twigvlm.pruning.select import best_first, unit


@dataclass(frozen=True)
class PruneSID(PerImage):
    """Before the decoder: the CLS token and R − 1 patches, of each group as many as its patches that do not resemble others.

    Fang et al., "Prune Redundancy, Preserve Essence" (2025). R/4 groups: a patch is in that of the principal component of
    sigmoid(features) with its largest loading. In a group non-maximum suppression ranks by the CLS token's attention and drops
    what is more similar than R/32 of the mean cosine. The components are exact, where the authors' are randomised.
    """

    paper: ClassVar[str] = "Fang et al., 2025, github.com/ZhengyaoFang/PruneSID"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the CLS token of one image, then patches group by group. CLS takes the position of the first that is gone."""
        cls = image.cls if keep > 1 else None
        tokens, importance = unit(image.features), image.vision.importance("sum")[image.rows]
        count = len(tokens)
        mean = (tokens.sum(dim=0).square().sum() - count) / (count * (count - 1))
        group = principal_groups(image.features.float(), max(1, keep // 4))
        members = [(group == index).nonzero()[:, 0] for index in group.unique().tolist()]
        ranked = [suppressed(tokens, importance, each, float(mean) * keep / 32) for each in members]
        counts = quotas([len(each) for each in members], [different for _, different in ranked], keep, cls is not None)
        patches = torch.cat([order[:number] for (order, _), number in zip(ranked, counts, strict=True)])
        if cls is None:
            return Picked(patches, image.projected[patches])
        gone = torch.ones(count, dtype=torch.bool, device=patches.device)
        gone[patches] = False
        projected = image.vision.project(torch.cat((cls, image.features[patches])))
        return Picked(torch.cat((gone.nonzero()[:1, 0], patches)), projected)


def principal_groups(features: Float[Tensor, "tokens width"], groups: int) -> Int[Tensor, " tokens"]:
    """For each token the number of the principal component of sigmoid(features) in which its absolute loading is the largest.

    Args:
        features: features; the tokens are the variables of the analysis.
        groups: number of components.
    """
    states = features.sigmoid().nan_to_num().T
    loadings = torch.linalg.svd(states - states.mean(dim=0), full_matrices=False).Vh[:groups]
    return loadings.abs().argmax(dim=0)


def suppressed(
    tokens: Float[Tensor, "tokens width"],
    importance: Float[Tensor, " tokens"],
    members: Int[Tensor, " group"],
    max_cosine: float,
) -> tuple[Int[Tensor, " group"], int]:
    """A group's tokens after non-maximum suppression, and how many of them were not suppressed; these come first.

    Args:
        tokens: features of length 1, of all tokens.
        importance: importance of all tokens; a less important token is suppressed by a more important one.
        members: indices of the group's tokens, at least one.
        max_cosine: cosine above which a token is suppressed.
    """
    order = members[best_first(importance[members])]
    left, kept = order, []
    while len(left):
        kept.append(left[0])
        left = left[1:][tokens[left[1:]] @ tokens[left[0]] <= max_cosine]
    different = torch.stack(kept)
    return torch.cat((different, order[~torch.isin(order, different)])), len(kept)


def quotas(sizes: Sequence[int], different: Sequence[int], keep: int, with_cls: bool) -> list[int]:
    """How many tokens each group keeps.

    Args:
        sizes: number of tokens of each group, at least 1.
        different: number of those that are not suppressed, at least 1.
        keep: R.
        with_cls: whether the CLS token is one of the R.

    Returns:
        At least one for each group, and the others in proportion to the tokens that are not suppressed. No group keeps more than
        5·⌈R/64⌉, or more than such tokens, unless R needs it. What is left of R goes first to the groups with the most of them.
    """
    total = keep - with_cls
    limits = [min(5 * ceil(keep / 64), size, each) for size, each in zip(sizes, different, strict=True)]
    while sum(limits) < min(keep, sum(sizes)):
        limits = [min(each + 1, size) for each, size in zip(limits, sizes, strict=True)]
    split, seen, before = [], 0, 0
    for each in different:
        seen += each
        up_to = round(seen / sum(different) * (total - len(sizes)))
        split.append(1 + up_to - before)
        before = up_to
    split = [min(count, limit) for count, limit in zip(split, limits, strict=True)]
    for index in sorted(range(len(sizes)), key=lambda index: -different[index]):
        split[index] += min(limits[index] - split[index], total - sum(split))
    return split
