"""`twigvlm inspect`: what the twig looks at and what it drafts, as a picture and a page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twigvlm.cli.demo import QUESTION
from twigvlm.config import Speculate


@dataclass(frozen=True)
class Inspect:
    """Show what a twig does with a question: scores of the patches, the kept ones, and which tokens of the answer it drafted."""

    image: Path | None = None
    """Image file. None: the scene that ships with the package."""
    prompt: str = QUESTION
    """Question about the image."""
    model: str = "sapling"
    """The base: `sapling` (embedded), a Hugging Face id or a directory."""
    twig: str | None = None
    """Twig that was grown on the base: a directory. On Sapling its own twig is the default."""
    retain: float | None = 64
    """Average number of visual tokens over all layers to prune down to for the answer. None: no pruning."""
    speculate: Speculate = "chain"
    """Draft answer tokens with the twig."""
    budgets: tuple[float, ...] = (192, 128, 64)
    """Average numbers of visual tokens to show the kept patches of."""
    deep_layer: int | None = None
    """Base layer, counted from 1, whose attention is shown beside the twig's. None: at 60 % of the depth."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights. auto: as the base's files say; bfloat16 for Sapling."""
    device: str = "auto"
    """Where to run: auto (a GPU if there is one), cpu, cuda, cuda:1, mps, …"""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    out: Path = Path("twigvlm-inspect")
    """Directory to write patches.png and answer.html to."""

    def run(self) -> None:
        """Ask once, and write the picture and the page."""
        from twigvlm.cli.inspection import run_inspection

        run_inspection(self)
