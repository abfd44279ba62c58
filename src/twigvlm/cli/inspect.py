"""`twigvlm inspect`: what the twig looks at and what it drafts, as a picture and a page."""

from dataclasses import dataclass
from pathlib import Path

from twigvlm.cli.asking import Asking


@dataclass(frozen=True)
class Inspect(Asking):
    """Show what a twig does with a question: scores of the patches, the kept ones, and which tokens of the answer it drafted."""

    budgets: tuple[float, ...] = (192, 128, 64)
    """Average numbers of visual tokens to show the kept patches of."""
    deep_layer: int | None = None
    """Base layer, counted from 1, whose attention is shown beside the twig's. None: at 60 % of the depth."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    out: Path = Path("twigvlm-inspect")
    """Directory to write patches.png and answer.html to."""

    def run(self) -> None:
        """Ask once, and write the picture and the page."""
        from twigvlm.cli.inspection import run_inspection

        run_inspection(self)
