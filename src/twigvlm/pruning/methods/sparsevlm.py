"""SparseVLM: cuts after three layers, by the attention of the words that the image is about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.layers import rotary_of
from twigvlm.base.prompt import Prompt
from twigvlm.base.token_inputs import rotate
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Choice, Cut, Need, scaled_layers, solve_cuts
from twigvlm.pruning.images import Positions, nearest_published
from twigvlm.pruning.methods.density_peaks import density_peaks
from twigvlm.pruning.question import attention_from, question_mask
from twigvlm.pruning.select import best_first, top_visual
from twigvlm.pruning.view import CutView

_LAYERS = (3, 7, 16)
_PUBLISHED = {
    # 300, 200, 110, …, and what is recycled
    "v1": {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Tokens of 576 after each cut, by what their authors call the budget."""
_FLOOR = 0.05  # of the distance kernel, which a division by it would not survive


@dataclass(frozen=True)
class SparseVLM:
    """At each cut the visual tokens stay that the raters attend to most in the layer before it.

    Zhang et al., "SparseVLM", ICML 2025. Raters are the text tokens after the image whose embeddings fit the visual
    ones better than the mean. v1 recycles: of what is dropped the best 30 %, and one token more, are clustered, and the
    clusters' means stay too. v2 recycles nothing, divides attention by what rotary embeddings alone make of a distance, and
    asks the half of the heads that then look at the image most.
    """

    version: Literal["v1", "v2"] = "v1"
    """"v2" is what the authors call SparseVLM+."""
    accounting: Literal["true", "published"] = "true"
    """"published": R̄ as the authors count it, where the layer before a cut counts with the tokens that the cut leaves."""
    positions: Positions = "kept"
    """"compacted" as published for v1, with the means after the other tokens."""
    paper: ClassVar[str] = "Zhang et al., ICML 2025, arXiv:2410.04417"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAST_LAYER})

    def __post_init__(self) -> None:
        if self.version == "v2" and self.positions == "compacted":
            raise TwigVLMError("pruner 'sparsevlm-v2': was not published with other positions; leave out compacted")

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """The published list whose budget is the nearest, scaled. Raises TwigVLMError if no scale has this average."""
        lists, at = _PUBLISHED[self.version], scaled_layers(_LAYERS, layers)
        if self.accounting == "published" and visual == 576 and retain in lists:
            return tuple(map(Cut, at, lists[int(retain)]))
        sizes = nearest_published(lists, retain, visual)
        counted = tuple(layer - 1 for layer in at) if self.accounting == "published" else at
        return solve_cuts(
            at, lambda share: [share * size / sizes[-1] for size in sizes], retain, visual, layers, counted
        )

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"] | Choice:
        """The visual tokens with the most attention, and in v1 the means of clusters of others."""
        scores, visual = self._scores(view), view.tokens.visual
        if self.version == "v2":
            return Choice(top_visual(scores, visual, keep))
        stays, hidden = torch.zeros_like(visual), view.tokens.hidden.clone()
        for row, count in enumerate(keep):
            indices, states = _recycled(scores[row], view.tokens.hidden[row], visual[row].nonzero()[:, 0], count)
            if self.positions == "compacted":
                indices = indices.sort().values
            stays[row, indices] = True
            hidden[row, indices] = states
        return Choice(stays, hidden, self.positions == "compacted")

    def _scores(self, view: CutView) -> Float[Tensor, "batch tokens"]:
        visual, layer = view.tokens.visual, view.base.layers[view.layer - 1]
        total, looks = torch.zeros(()), torch.zeros(())
        for shares, asks, inputs in attention_from(view, raters(view.prompt)):
            given = shares * asks[:, None, :, None]
            if self.version == "v2":
                kernel = distance_kernel(rotary_of(layer, inputs), rotary_of(layer, view.tokens.inputs))
                given = given / kernel[:, None]
            total, looks = total + given.sum(dim=2), looks + (given * visual[:, None, None]).sum(dim=(2, 3))
        if self.version == "v1":
            return total.mean(dim=1)
        heads = looks.topk(max(1, looks.shape[1] // 2), dim=1).indices
        return total.gather(1, heads[..., None].expand(-1, -1, total.shape[2])).mean(dim=1)


def raters(prompt: Prompt) -> Bool[Tensor, "batch tokens"]:
    """True at the text tokens after the last image that fit it better than the mean; without any, at all of that text.

    The fit is the product of embeddings, as a softmax over the text for each visual token, and the mean of these.
    """
    chosen = question_mask(prompt)
    for row in range(len(prompt.lengths)):
        text, visual = chosen[row].nonzero()[:, 0], prompt.hidden[row, prompt.visual_mask[row]]
        if len(text) < 2 or not len(visual):
            continue
        given = (visual @ prompt.hidden[row, text].T).float().softmax(dim=-1).mean(dim=0)
        if bool((given > given.mean()).any()):
            chosen[row, text] = given > given.mean()
    return chosen


def distance_kernel(
    queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]
) -> Float[Tensor, "batch queries tokens"]:
    """The product of a query and a key of ones after rotary embeddings, divided by the product before; at least 0.05.

    Args:
        queries: cosines and sines of the queries' positions, [batch, queries, rotary_dim].
        keys: cosines and sines of the keys' positions, [batch, tokens, rotary_dim].
    """

    def ones(rotary: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rotary
        return rotate(torch.ones_like(cos)[:, None].float(), cos.float(), sin.float())[:, 0]

    width = keys[0].shape[-1]
    return (ones(queries) @ ones(keys).transpose(1, 2) / width).clamp(min=_FLOOR)


def recycling(visual: int, keep: int) -> tuple[int, int]:
    """How many of the visual tokens stay, and how many clusters the others are recycled to; together `keep`.

    As published 30 % of the others and one more are recycled, to a cluster for every ten of them and one more. Where no such
    numbers sum up to `keep`, nothing is recycled.
    """
    for count in range(keep, 0, -1):
        if visual == count:
            return count, 0
        clusters = (int((visual - count) * 0.3) + 1) // 10 + 1
        if count + clusters == keep:
            return count, clusters
    return keep, 0


def _recycled(
    scores: Float[Tensor, " tokens"], hidden: Float[Tensor, "tokens width"], visual: Int[Tensor, " visual"], keep: int
) -> tuple[Int[Tensor, " keep"], Float[Tensor, "keep width"]]:
    """Indices and states of the tokens that stay, in their order, followed by those of the clusters' means."""
    count, clusters = recycling(len(visual), keep)
    ranked = visual[best_first(scores[visual])]
    kept = ranked[:count].sort().values
    if not clusters:
        return kept, hidden[kept]
    recycled = ranked[count : count + int((len(visual) - count) * 0.3) + 1].sort().values
    centers, cluster = density_peaks(hidden[recycled].float(), clusters)
    sums = torch.zeros(clusters, hidden.shape[1], device=hidden.device)
    sums.index_add_(0, cluster, hidden[recycled].float())
    means = sums / torch.bincount(cluster, minlength=clusters)[:, None]
    return torch.cat((kept, recycled[centers])), torch.cat((hidden[kept], means.to(hidden)))
