"""Options of the commands that ask Sapling's own question unless told otherwise."""

from dataclasses import dataclass
from typing import Literal

from twigvlm.config import Speculate


@dataclass(frozen=True)
class Asking:
    """One question about one picture, through a twig."""

    image: str | None = None
    """Image file, or a data URI. None: the scene that ships with the package."""
    prompt: str = "Describe this image in detail."
    """Question about the image."""
    model: str = "sapling"
    """The base: `sapling` (embedded), a Hugging Face id or a directory."""
    twig: str | None = None
    """Twig that was grown on the base: a directory or a hub id. On Sapling its own twig is the default."""
    retain: float | None = 64
    """Average number of visual tokens over all layers to prune down to for the answer. None: no pruning."""
    speculate: Speculate = "chain"
    """Draft answer tokens with the twig."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights. auto: as the base's files say; Sapling's is bfloat16, on a CPU without it float32."""
    device: str = "auto"
    """Where to run: auto (a GPU if there is one), cpu, cuda, cuda:1, mps, …"""
