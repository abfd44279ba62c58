"""VisionZip: the patches that the CLS token attends to most, and a few that the others merge into."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twigvlm.base.vision import Vision
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Need
from twigvlm.pruning.images import ImageTokens, PerImage, Picked, nearest, top
from twigvlm.pruning.projector import tuned_projector
from twigvlm.pruning.select import unit


@dataclass(frozen=True)
class VisionZip(PerImage):
    """Before the decoder: d dominant tokens, the CLS token and the patches that it attends to most, and c contextual ones.

    Yang et al., "VisionZip", CVPR 2025. Of the patches that are not dominant every ⌊n/c⌋-th is a contextual token; the
    others are added to the most similar of them (by keys) as the mean of its group, before the projector.
    """

    contextual: float = 5 / 32
    """c of c + d: 30 of 192, 20 of 128, 10 of 64."""
    projector: str | nn.Module | None = None
    """In place of the base's: the directory of one that was tuned for merged tokens (VisionZip‡, `twigvlm train visionzip`), or
    the module itself."""
    paper: ClassVar[str] = "Yang et al., CVPR 2025, arXiv:2412.04467"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def __post_init__(self) -> None:
        if not 0 <= self.contextual <= 1:
            raise TwigVLMError(
                f"contextual={self.contextual:g}: must be 0 to 1, the share of the kept tokens that others merge into"
            )

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose CLS, dominant patches and contextual tokens. CLS takes the position of the first patch that is dropped."""
        contextual = min(int(keep * self.contextual + 0.5), keep - 1)
        dominant, cls = keep - contextual, image.cls
        if dominant < 2:
            cls = None
        patches = top(image.importance, dominant - (cls is not None))
        dropped = torch.ones(len(image), dtype=torch.bool, device=patches.device)
        dropped[patches] = False
        others = dropped.nonzero()[:, 0]
        features = image.features.float()
        states, indices = [features[patches]], [patches]
        if contextual:
            step = max(1, len(others) // contextual)
            targets = others[::step][:contextual]
            dropped[targets] = False
            merged = dropped.nonzero()[:, 0]
            keys = unit(image.keys)
            _, nearest_target = nearest(keys[merged], keys[targets])
            sums = torch.zeros_like(features[targets]).index_add_(0, nearest_target, features[merged])
            sizes = torch.bincount(nearest_target, minlength=contextual).clamp(min=1)
            states.append(features[targets] + sums / sizes[:, None])
            indices.append(targets)
        if cls is not None:
            states.insert(0, cls.float())
            indices.insert(0, dropped.nonzero()[:1, 0])
        return Picked(torch.cat(indices), self.project(image.vision, torch.cat(states)))

    def project(self, vision: Vision, features: Float[Tensor, "kept features"]) -> Float[Tensor, "kept width"]:
        """Merged features as visual tokens.

        Args:
            vision: the vision that the features come from.
            features: merged features, before the projector.

        Raises:
            TwigVLMError: the projector cannot be replaced.
        """
        if self.projector is not None and vision.projector is None:
            raise TwigVLMError(
                "projector: this base merges patches in its own, which no other can replace; leave it out"
            )
        if isinstance(self.projector, nn.Module):
            projected: Tensor = self.projector(features[None].to(next(self.projector.parameters()).dtype))
            return projected[0].to(vision.projected)
        projector = vision.projector
        weights = None if self.projector is None or projector is None else tuned_projector(self.projector, projector)
        return vision.project(features.to(vision.features), weights)
