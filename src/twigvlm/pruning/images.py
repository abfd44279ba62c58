"""Cuts before the decoder: methods that choose among the visual tokens of each image by what the vision tower made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.base.vision import Vision
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Choice, Cut, Need, solve_cuts
from twigvlm.pruning.select import best_first
from twigvlm.pruning.view import CutView

Positions = Literal["kept", "compacted"]
"""Whether the tokens that stay have the positions that they had in the prompt, or consecutive ones."""
T = TypeVar("T")
_CHUNK = 64  # rows of similarities that are computed at a time


@dataclass(frozen=True)
class ImageTokens:
    """The visual tokens of one image, tile or pair of frames that are left in a prompt, in the order of the prompt."""

    vision: Vision
    rows: Int[Tensor, " tokens"]
    """Their rows in the tensors of `vision`."""
    question: Float[Tensor, "text width"]
    """Embeddings of the text after the last visual token of the prompt."""
    question_ids: Int[Tensor, " text"]
    """Ids of the same text."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def features(self) -> Float[Tensor, "tokens features"]:
        """Before the projector; where it merges patches, after it."""
        return self.vision.features[self.rows]

    @property
    def projected(self) -> Float[Tensor, "tokens width"]:
        """As the language model gets them."""
        return self.vision.projected[self.rows]

    @property
    def importance(self) -> Float[Tensor, " tokens"]:
        """The CLS token's attention, mean over heads, or the attention that a patch receives where there is no CLS."""
        return self.vision.importance()[self.rows]

    @property
    def keys(self) -> Float[Tensor, "tokens head_dim"]:
        """Keys of the block whose output the features are, mean over heads."""
        return self.vision.keys[self.rows]

    @property
    def cls(self) -> Float[Tensor, "1 features"] | None:
        """Features of the image's CLS token; None: it has none, or its CLS token is a visual token like its patches."""
        return self.vision.cls.get(int(self.vision.image[self.rows[0]]))


class Picked(NamedTuple):
    """What a method keeps of one image."""

    indices: Int[Tensor, " kept"]
    """Which of the image's tokens have their positions used."""
    states: Float[Tensor, "kept width"] | None = None
    """What stands there, in the order in which the method's authors line it up; None: the tokens themselves."""


def nearest_published(by_budget: Mapping[int, T], retain: float | None, visual: int) -> T:
    """What was published for the budget that is nearest to this one, in proportion to the visual tokens.

    Args:
        by_budget: what was published for 576 visual tokens, by R̄.
        retain: R̄ of the prompt; None stands for 0.
        visual: M, number of its visual tokens.
    """
    wanted = 0.0 if retain is None else 576 * retain / visual
    return by_budget[min(by_budget, key=lambda budget: abs(budget - wanted))]


@dataclass(frozen=True)
class PerImage:
    """A method with one cut before the decoder, which chooses in each image separately.

    A subclass says by `pick` how it chooses, and by `needs` what it looks at.
    """

    positions: Positions = field(default="kept", kw_only=True)
    """Positions of the tokens that stay; "compacted" as published, in the order in which `pick` gives them."""
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION})

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the tokens of one image.

        Args:
            image: its visual tokens, at least two.
            keep: how many of them stay; at least one, and fewer than all.

        Returns:
            As many different tokens, and what stands at their positions.
        """
        raise NotImplementedError

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """One cut before the decoder. Raises TwigVLMError if R̄ is not in 1..M."""
        return solve_cuts((0,), lambda share: (share,), retain, visual, layers)

    def choose(self, view: CutView, keep: Sequence[int]) -> Choice:
        """Split every prompt's budget among its images in proportion to their tokens, and choose in each of them.

        Visual tokens that are not patches, such as the ends of lines between tiles, are dropped first. An image that keeps all
        its tokens does not change.

        Args:
            view: the prompts before the decoder.
            keep: R of each prompt.

        Raises:
            TwigVLMError: the base does not tell what the method needs, or the method does not name `Need.VISION`.
        """
        vision = view.prompt.vision
        if vision is None:
            raise TwigVLMError(
                "pruner: ranks by the vision tower; name Need.VISION in its needs, so that it is watched"
            )
        stays, hidden = torch.zeros_like(view.tokens.visual), view.tokens.hidden.clone()
        for row, count in enumerate(keep):
            source, visual = vision.source[row], view.tokens.visual[row]
            patches = (visual & (source >= 0)).nonzero()[:, 0]
            others = (visual & (source < 0)).nonzero()[:, 0]
            stays[row, others[: max(0, count - len(patches))]] = True
            last = int(visual.nonzero()[-1]) if count else 0
            question = slice(last + 1, view.tokens.lengths[row])
            asked = view.tokens.hidden[row, question], view.prompt.input_ids[row, question]
            groups = _by_image(vision.image[source[patches]], patches)
            for group, share in zip(groups, shares(min(count, len(patches)), list(map(len, groups))), strict=True):
                if share == len(group):
                    stays[row, group] = True
                elif share:
                    indices, states = self.pick(ImageTokens(vision, source[group], *asked), share)
                    if self.positions == "compacted":
                        indices = indices.sort().values
                    stays[row, group[indices]] = True
                    if states is not None:
                        hidden[row, group[indices]] = states.to(hidden)
        return Choice(stays, hidden, self.positions == "compacted" and not bool(stays.eq(view.tokens.visual).all()))


def _by_image(image: Int[Tensor, " patches"], patches: Int[Tensor, " patches"]) -> list[Tensor]:
    """The patches of each image, in the order of the prompt."""
    return [patches[image == number] for number in image.unique().tolist()]


def shares(keep: int, sizes: Sequence[int]) -> list[int]:
    """A number of tokens split in proportion to sizes, by the method of largest remainders.

    Args:
        keep: the number of tokens.
        sizes: sizes, which sum up to at least that number; no part is larger than its size.
    """
    total = max(sum(sizes), 1)
    split = [keep * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (-(keep * sizes[index] % total), index))
    for index in by_remainder[: keep - sum(split)]:
        split[index] += 1
    return split


def top(scores: Float[Tensor, " tokens"], keep: int) -> Int[Tensor, " kept"]:
    """The tokens with the highest scores, in their order; of equal scores the earlier one, and NaN as the lowest."""
    return best_first(scores)[:keep].sort().values


def nearest(
    rows: Float[Tensor, "tokens width"], among: Float[Tensor, "others width"], exclude_self: bool = False
) -> tuple[Float[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """For each row the largest product with the rows of a set, and the row that has it; no table of all products is made.

    Args:
        rows: rows of length 1.
        among: the set, of length 1 too; at least one row, or two with `exclude_self`.
        exclude_self: whether both arguments are the same rows, none of which is its own nearest.
    """
    values, indices = [], []
    for start in range(0, len(rows), _CHUNK):
        products = rows[start : start + _CHUNK] @ among.T
        if exclude_self:
            products.diagonal(start).fill_(-2.0)
        value, index = products.max(dim=1)
        values.append(value)
        indices.append(index)
    return torch.cat(values), torch.cat(indices)
