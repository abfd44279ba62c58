"""`twigvlm demo`: the same question, plainly and through the twig, side by side."""

from dataclasses import dataclass
from pathlib import Path

from twigvlm.cli.asking import Asking

ATTENTIONS = ("sdpa", "eager")
"""Implementations that plain runs may use; the faster one here is what the twig is compared with."""


@dataclass(frozen=True)
class Demo(Asking):
    """Ask a question about a picture twice, plainly and through a twig, and compare answers and speed."""

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    runs: int = 5
    """Timed runs of each kind, alternating, after one of each to warm up; the medians are shown. Plain runs use the base's faster
    attention implementation, sdpa or eager."""
    out: Path = Path("twigvlm-demo.png")
    """Picture to write: the scene with the kept patches highlighted."""

    def run(self) -> None:
        """Ask, print the table on stdout and write the picture."""
        from rich.console import Console

        from twigvlm.cli.answer import Answer, ask, check_request
        from twigvlm.cli.output import busy, check_picture_path, progress, write_picture
        from twigvlm.cli.session import Plan, default_picture, open_session, patch_grid, seen_box
        from twigvlm.cli.table import compare
        from twigvlm.errors import TwigVLMError
        from twigvlm.images import load_image
        from twigvlm.visualize import highlight

        if self.runs < 1:
            raise TwigVLMError(f"runs={self.runs}: must be 1 or more")
        plan = Plan.resolve(self.model, self.twig, self.retain, self.speculate)
        if not plan.accelerated:
            raise TwigVLMError(
                "retain=None with speculate=none: nothing to compare; add --retain 64 or --speculate chain"
            )
        check_request(self.prompt, self.max_new_tokens)
        check_picture_path(self.out)
        image = load_image(self.image or default_picture())
        with busy(f"Loading {self.model}"):
            session = open_session(plan, self.dtype, self.device)

        assert session.model is not None

        with progress() as bar:
            task = bar.add_task("Asking plainly and through the twig", total=1 + 2 * len(ATTENTIONS) + 2 * self.runs)

            def ask_once(attention: str | None) -> Answer:
                """Plainly with an attention implementation; None: through the twig."""
                plainly = attention is not None
                answer = ask(
                    session, image, self.prompt, self.max_new_tokens, accelerated=not plainly, attention=attention
                )
                bar.advance(task)
                return answer

            ask_once(None)
            for attention in ATTENTIONS:
                ask_once(attention)
            speeds = {attention: ask_once(attention).tokens_per_second for attention in ATTENTIONS}
            fastest = max(speeds, key=lambda attention: speeds[attention])
            plain, twig = [], []
            for _ in range(self.runs):
                plain.append(ask_once(fastest))
                twig.append(ask_once(None))
        console = Console()
        console.print(compare(self.prompt, plain, twig, (fastest, session.model.base.attention)))

        grid = patch_grid(session.base, twig[0].visual_tokens)
        if grid is None:
            console.print("No picture written: this model's visual tokens form no square grid.")
            return
        kept = twig[0].kept_indices
        kept = list(range(twig[0].visual_tokens)) if kept is None else kept
        write_picture(highlight(image, kept, grid, seen_box(session.processor, image)), self.out)
        console.print(f"Kept patches: {self.out}", markup=False, highlight=False, soft_wrap=True)
