"""PruMerge+: attended patches and evenly spaced ones, each of which takes up similar ones that go."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Need
from twigvlm.pruning.images import ImageTokens, PerImage, Picked
from twigvlm.pruning.select import best_first, unit

_CHUNK = 64  # centres whose neighbours are found at a time


@dataclass(frozen=True)
class PruMerge(PerImage):
    """Before the decoder: R − 1 centres with the attention-weighted sum of their neighbours, and one token of all that go.

    Shang et al., "LLaVA-PruMerge", ICCV 2025. The attention is the CLS token's in the tower's last block, of a single head
    over the whole width. The authors count centres by outliers, which differ from image to image; here a quarter of a
    budget goes by attention and the rest is evenly spaced, as there are about three samples of PruMerge+ to an outlier.
    """

    neighbours: int = 32
    """Number of neighbours of a centre, by the keys of the last block: other centres may be among them."""
    attended: float = 0.25
    """Share of the centres that are chosen by attention; 1: PruMerge, without +."""
    paper: ClassVar[str] = "Shang et al., ICCV 2025, arXiv:2403.15388"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.VISION, Need.TOWER_ATTENTION})

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise TwigVLMError(f"neighbours={self.neighbours}: must be 1 or more, the patches that a centre takes up")
        if not 0 <= self.attended <= 1:
            raise TwigVLMError(
                f"attended={self.attended:g}: must be 0 to 1, the share of centres that attention chooses"
            )

    def pick(self, image: ImageTokens, keep: int) -> Picked:
        """Choose the centres of one image. The token of all others comes last, at the position of the first dropped patch."""
        attention, keys = image.vision.single_head[image.rows], unit(image.vision.last_keys[image.rows])
        attended = min(keep - 1, int((keep - 1) * self.attended + 0.5))
        first = best_first(attention)[:attended]
        is_center = torch.zeros(len(image), dtype=torch.bool, device=attention.device)
        is_center[first] = True
        others = (~is_center).nonzero()[:, 0]
        spaced = keep - 1 - attended
        then = others[torch.arange(spaced, device=others.device) * len(others) // max(spaced, 1)]
        is_center[then] = True
        centers, gone = torch.cat((first, then)), (~is_center).nonzero()[:, 0]
        weighted = image.features.float() * attention[:, None]
        states = [image.features.float()[centers]]
        for part in torch.arange(len(centers), device=centers.device).split(_CHUNK):
            similar = keys[centers[part]] @ keys.T
            similar.scatter_(1, centers[part, None], float("-inf"))  # none is its own neighbour
            index = similar.topk(min(self.neighbours, len(image) - 1), dim=1).indices
            states[0][part] += torch.zeros_like(similar).scatter(1, index, 1.0) @ weighted
        states.append(weighted[gone].sum(dim=0, keepdim=True))
        projected = image.vision.project(torch.cat(states).to(image.vision.features))
        return Picked(torch.cat((centers, gone[:1])), projected)
