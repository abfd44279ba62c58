"""What a base hands to its language model, batches of different lengths included."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twigvlm.base.packing import Lengths, left_pack
from twigvlm.base.vision import Vision


@dataclass(frozen=True)
class Prompt:
    """What the base hands to its language model: text and visual tokens merged, nothing decoded yet."""

    hidden: Float[Tensor, "batch tokens width"]
    """Merged embeddings."""
    position_ids: Int[Tensor, "*axes batch tokens"]
    """Position of each token; with M-RoPE of each token on 3 axes, or 4 of which the first is its place."""
    visual_mask: Bool[Tensor, "batch tokens"]
    """True at visual tokens."""
    input_ids: Int[Tensor, "batch tokens"]
    """The ids, placeholders included."""
    lengths: Lengths
    """Tokens of each row. They come first; what follows them in shorter rows is padding, which no token sees."""
    attends_until: Int[Tensor, "batch tokens"] | None = None
    """Index of the last token that each token sees, where some see beyond themselves."""
    deepstack: tuple[Tensor, ...] = ()
    """Entry i is added to the states after layer i, [batch, tokens, width]: 0 at text tokens."""
    vision: Vision | None = None
    """What the vision tower made of the pixels, where it was asked for."""

    @property
    def next_positions(self) -> list[int]:
        """Position that each row's next token has, for rotary embeddings."""
        last = torch.tensor(self.lengths, device=self.position_ids.device)[:, None] - 1
        at_end = self.position_ids.gather(-1, last.expand(*self.position_ids.shape[:-1], 1))[..., 0]
        axes = at_end[-3:] if at_end.ndim == 2 else at_end[None]
        return (axes.amax(dim=0) + 1).tolist()

    def rows(self, rows: Sequence[int]) -> "Prompt":
        """Some of the prompts, padded to the longest of them; a prompt may be taken several times."""
        if list(rows) == list(range(len(self.lengths))):
            return self
        lengths = tuple(self.lengths[row] for row in rows)
        index = torch.tensor(rows, device=self.hidden.device)

        def pick(values: Tensor) -> Tensor:
            return values.index_select(0, index)[:, : max(lengths)]

        return Prompt(
            pick(self.hidden),
            self.position_ids.index_select(-2, index)[..., : max(lengths)],
            pick(self.visual_mask),
            pick(self.input_ids),
            lengths,
            None if self.attends_until is None else pick(self.attends_until),
            tuple(pick(features) for features in self.deepstack),
            self.vision and replace(self.vision, source=pick(self.vision.source)),
        )


def attention_ends_of(masks: Any) -> Tensor | None:
    """Index of the last token that each token sees, by the masks that a base makes itself; None if all are causal."""
    mask = masks.get("full_attention") if isinstance(masks, dict) else None
    if mask is None:
        return None
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    index = torch.arange(allowed.shape[-1], device=allowed.device)
    attends_until = torch.where(allowed, index, -1).amax(dim=-1).maximum(index)
    return None if bool((attends_until == index).all()) else attends_until


def deepstack_of(hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Features that the base hands to its language model for the states after its first layers."""
    features = kwargs.get("deepstack_visual_embeds")
    if features is None:
        return ()
    where = kwargs["visual_pos_masks"].to(hidden.device)
    return tuple(_spread(hidden, where, feature) for feature in features)


def packed(prompt: Prompt, real: Bool[Tensor, "batch tokens"]) -> Prompt:
    """A padded prompt with each row's own tokens first, so that causal attention alone hides the padding."""
    order, lengths = left_pack(real)

    def move(values: Tensor) -> Tensor:
        return torch.take_along_dim(values, order.view(*order.shape, *[1] * (values.ndim - 2)), dim=1)

    positions = prompt.position_ids
    axes = order.expand(*positions.shape[:-1], -1)
    attends_until = prompt.attends_until
    if attends_until is not None:  # an index among all tokens -> among the real ones
        attends_until = torch.gather(real.long().cumsum(-1) - 1, 1, move(attends_until))
    return Prompt(
        move(prompt.hidden),
        torch.gather(positions, -1, axes),
        move(prompt.visual_mask & real),
        move(prompt.input_ids),
        lengths,
        attends_until,
        tuple(move(features) for features in prompt.deepstack),
        prompt.vision and replace(prompt.vision, source=move(prompt.vision.source)),
    )


def _spread(hidden: Tensor, where: Tensor, feature: Tensor) -> Tensor:
    everywhere = torch.zeros_like(hidden)
    everywhere[where] = feature.to(hidden)
    return everywhere
