"""The demo's table."""

from statistics import median

from rich.table import Table
from rich.text import Text

from twigvlm.cli.answer import Answer


def compare(question: str, plain: list[Answer], twig: list[Answer], attentions: tuple[str, str]) -> Table:
    """One table of both answers, with medians over the runs; the speed-up is the ratio of tokens per second.

    `attentions` are the implementations that plain runs and the twig used.
    """

    def middle(answers: list[Answer], name: str) -> float:
        return median(getattr(answer, name) for answer in answers)

    speeds = middle(plain, "tokens_per_second"), middle(twig, "tokens_per_second")
    table = Table(title=Text(question), show_lines=True)
    table.add_column("")
    table.add_column("plain", ratio=1)
    table.add_column("through the twig", ratio=1)
    table.add_row("answer", Text(plain[0].text), Text(twig[0].text))
    table.add_row("same answer", "", "yes" if plain[0].text == twig[0].text else "no")
    table.add_row("visual tokens kept", *(f"{one[0].kept_tokens} of {one[0].visual_tokens}" for one in (plain, twig)))
    table.add_row("answer tokens", *(str(one[0].num_tokens) for one in (plain, twig)))
    drafted, accepted = sum(twig[0].drafted_lengths or []), sum(twig[0].accepted_lengths or [])
    if drafted:
        table.add_row("drafted tokens accepted", "", f"{accepted} of {drafted}")
    table.add_row("attention", *attentions)
    table.add_row("prefill, ms", *(f"{middle(one, 'prefill_ms'):.0f}" for one in (plain, twig)))
    table.add_row("decoding, ms", *(f"{middle(one, 'decode_ms'):.0f}" for one in (plain, twig)))
    table.add_row("tokens/s", *(f"{speed:.1f}" for speed in speeds))
    table.add_row("speed-up", "1.00x", f"{speeds[1] / speeds[0]:.2f}x")
    return table
