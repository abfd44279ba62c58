"""HoloV: attended patches, with a quota for each segment of the image."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Need
from twigvlm.pruning.images import ImageTokens, PerImage, Picked
from twigvlm.pruning.select import best_first

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class HoloV(PerImage):
    """Before the decoder each of 16 segments of an image keeps its patches with the most attention, as many as its quota.

    Zou et al., "Don't Just Chase Highlighted Tokens in MLLMs", NeurIPS 2025. Segments are runs of patches in raster
    order, quotas are in proportion to the mean attention in a segment. The paper adds the variance of similarities, scaled in
    each segment to the mean of its attention: a factor that all segments have, so that it cancels out of the quotas.
    """

    segments: int = 16
    """Number of segments of an image; an image of fewer tokens has one for each token."""
    paper: ClassVar[str] = "Zou et al., NeurIPS 2025, arXiv:2510.02912"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise TwigVLMError(f"segments={self.segments}: must be 1 or more, the parts of an image that have a quota")

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the tokens of one image. What exceeds a segment goes to those with the largest means that have room."""
        attention = image.importance
        segments = torch.arange(len(image), device=attention.device).tensor_split(min(self.segments, len(image)))
        # Attention may vanish in float32, or overflow in a tower in half precision.
        means = torch.stack([attention[segment].mean() for segment in segments]).nan_to_num()
        ranked = best_first(means).tolist()
        quota = [int(share) for share in (means / means.sum().clamp(min=_TINY) * keep).tolist()]
        for index in ranked[: max(0, keep - sum(quota))]:
            quota[index] += 1
        quota = [min(count, len(segment)) for count, segment in zip(quota, segments, strict=True)]
        for index in ranked:
            quota[index] += min(keep - sum(quota), len(segments[index]) - quota[index])
        by_attention = [segment[best_first(attention[segment])] for segment in segments]
        chosen = torch.cat([segment[:count] for segment, count in zip(by_attention, quota, strict=True)])
        return Picked(chosen, image.projected[chosen])
