"""What a user can choose, as frozen dataclasses; the command line's options and help are made from them."""

from dataclasses import dataclass
from typing import Literal

from twigvlm.errors import TwigVLMError


@dataclass(frozen=True)
class TwigConfig:
    """Shape of a twig (method of the paper's §3.1; the defaults are the published ones)."""

    trunk_layers: int = 2
    """K: base layers shared by the base and the twig; the twig grows on the output of layer K."""
    twig_layers: int = 3
    """T: decoder layers of the twig."""
    init: Literal["next", "last", "random"] = "next"
    """Twig layers start as copies of base layers K+1..K+T, of the last T base layers, or at random."""
    head: Literal["own", "shared"] = "own"
    """Prediction head: a trainable copy of the base's LM head, or the frozen base's head itself."""
    final_wipe: int | None = None
    """K_f the twig was tuned with: no visual token enters layers after K_f. None: no FinalWipe (K_f = L)."""

    def __post_init__(self) -> None:
        if self.trunk_layers < 0:
            raise TwigVLMError(f"trunk_layers={self.trunk_layers}: must be 0 or more")
        if self.twig_layers < 1:
            raise TwigVLMError(f"twig_layers={self.twig_layers}: must be 1 or more")
