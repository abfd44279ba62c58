"""`twigvlm demo`: the same question, plainly and through the twig, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twigvlm.cli.options import QuestionOptions

if TYPE_CHECKING:
    from rich.table import Table

    from twigvlm.cli.answer import Answer

ATTENTIONS = ("sdpa", "eager")
"""Implementations that plain runs may use; the faster one here is what the twig is compared with."""


@dataclass(frozen=True)
class Demo(QuestionOptions):
    """Compare answers and speed of a question asked plainly and through a twig."""

    max_new_tokens: int = 128
    runs: int = 5
    """Timed runs of each kind, alternating, after one of each to warm up; the medians are shown. Plain runs use the base's
    faster attention implementation, sdpa or eager."""
    out: Path = Path("twigvlm-demo.png")
    """Picture to write: the image with the kept patches highlighted."""

    def run(self) -> None:
        """Ask, print the table on stdout and write the picture."""
        from rich.console import Console

        from twigvlm.cli.answer import answer_question, check_request
        from twigvlm.cli.output import check_picture_path, steps, write_picture
        from twigvlm.cli.session import SessionConfig, default_picture, open_session, patch_grid, seen_box
        from twigvlm.config import PruningConfig
        from twigvlm.errors import TwigVLMError
        from twigvlm.images import load_image
        from twigvlm.inputs import user_turn
        from twigvlm.visualize import highlight

        if self.runs < 1:
            raise TwigVLMError(f"runs={self.runs}: must be 1 or more")
        config = SessionConfig.resolve(self.model, self.twig, PruningConfig(self.retain), self.speculate)
        if not config.accelerated:
            raise TwigVLMError(
                "retain=None with speculate=none: nothing to compare; add --retain 64 or --speculate chain"
            )
        check_request(self.prompt, self.max_new_tokens)
        check_picture_path(self.out)
        image = load_image(self.image or default_picture())
        session = open_session(config, self.dtype, self.device)

        assert session.model is not None
        question = user_turn(self.prompt, image)

        total = 1 + 2 * len(ATTENTIONS) + 2 * self.runs
        with steps("Asking plainly and through the twig", total, last_line=False) as advance:

            def ask(attention: str | None) -> Answer:
                """Plainly with an attention implementation; None: through the twig."""
                accelerated = attention is None
                answer = answer_question(
                    session, question, self.max_new_tokens, accelerated=accelerated, attention=attention
                )
                advance()
                return answer

            ask(None)
            for attention in ATTENTIONS:
                ask(attention)
            speeds = {attention: ask(attention).tokens_per_second for attention in ATTENTIONS}
            fastest = max(speeds, key=lambda attention: speeds[attention])
            plain, twig = [], []
            for _ in range(self.runs):
                plain.append(ask(fastest))
                twig.append(ask(None))
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


def compare(question: str, plain: list[Answer], twig: list[Answer], attentions: tuple[str, str]) -> Table:
    """One table of both answers, with medians over the runs; the speed-up is the ratio of tokens per second.

    `attentions` are the implementations that plain runs and the twig used.
    """
    from statistics import median

    from rich.table import Table
    from rich.text import Text

    def middle(answers: list[Answer], name: str) -> float:
        return median(getattr(answer, name) for answer in answers)

    both = plain, twig
    speeds = [middle(answers, "tokens_per_second") for answers in both]
    table = Table(title=Text(question), show_lines=True)
    table.add_column("")
    table.add_column("plain", ratio=1)
    table.add_column("through the twig", ratio=1)
    table.add_row("answer", Text(plain[0].text), Text(twig[0].text))
    table.add_row("same answer", "", "yes" if plain[0].text == twig[0].text else "no")
    table.add_row(
        "visual tokens kept", *(f"{answers[0].kept_tokens} of {answers[0].visual_tokens}" for answers in both)
    )
    table.add_row("answer tokens", *(str(answers[0].num_tokens) for answers in both))
    drafted, accepted = sum(twig[0].drafted_lengths or []), sum(twig[0].accepted_lengths or [])
    if drafted:
        table.add_row("drafted tokens accepted", "", f"{accepted} of {drafted}")
    table.add_row("attention", *attentions)
    table.add_row("prefill, ms", *(f"{middle(answers, 'prefill_ms'):.0f}" for answers in both))
    table.add_row("decoding, ms", *(f"{middle(answers, 'decode_ms'):.0f}" for answers in both))
    table.add_row("tokens/s", *(f"{speed:.1f}" for speed in speeds))
    table.add_row("speed-up", "1.00x", f"{speeds[1] / speeds[0]:.2f}x")
    return table
