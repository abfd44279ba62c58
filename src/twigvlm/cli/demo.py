"""`twigvlm demo`: compare answers of the base, with drafts by the twig, and with pruning and drafts, side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from twigvlm.cli.options import Dtype, QuestionOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from PIL import Image
    from rich.table import Table
    from rich.text import Text

    from twigvlm.cli.answer import Answer
    from twigvlm.cli.session import Session

ATTENTIONS = ("sdpa", "eager")
"""Attention implementations of plain runs; the twig is compared with the one that is faster on this machine."""

QUESTIONS = ("What does the sign say?", "Describe this image in detail.")
PLAIN, EXACT, PRUNED = "plain", "speculation", "pruning + speculation"
PANELS = 6
"""Largest number of panels, each a set of kept patches, in the picture."""


@dataclass(frozen=True)
class Demo(QuestionOptions):
    """Compare answers and speed: plain, with speculation only (the same answer), and with pruning as well (which may differ)."""

    prompt: str | None = None
    """Question about the image. None: a short question and a description."""
    dtype: Dtype = "float32"
    """Data type of the weights. auto: as the base's files say; in half precision, speculation may change an answer."""
    diverse: bool = True
    refocus: float | None = 0.7
    max_new_tokens: int = 128
    runs: int = 3
    """Number of timed runs of each kind, in alternation and after a warm-up; the medians are shown. Plain runs use the faster
    of the base's attention implementations, sdpa or eager."""
    out: Path = Path("twigvlm-demo.png")
    """Picture to write: the image with the kept patches highlighted."""

    def run(self) -> None:
        """Ask, print a table for each question and a summary on stdout, and write the picture."""
        from twigvlm.cli.answer import check_request
        from twigvlm.cli.output import Printer, check_picture_path, steps, write_picture
        from twigvlm.cli.session import SessionConfig, default_picture, open_session
        from twigvlm.config import PruningConfig
        from twigvlm.errors import TwigVLMError
        from twigvlm.images import load_image

        if self.runs < 1:
            raise TwigVLMError(f"runs={self.runs}: must be 1 or more")
        # Without a budget the defaults mean nothing, but what was asked for is refused.
        asked = {name: getattr(self, name) for name in ("diverse", "refocus")}
        asked = {
            name: value for name, value in asked.items() if self.retain is not None or value != getattr(Demo, name)
        }
        pruning = PruningConfig(self.retain, **asked)
        config = SessionConfig.resolve(self.model, self.twig, pruning, self.speculate)
        if not config.accelerated:
            raise TwigVLMError(
                "retain=None with speculate=none: nothing to compare; add --retain 64 or --speculate chain"
            )
        questions = QUESTIONS if self.prompt is None else (self.prompt,)
        for question in questions:
            check_request(question, self.max_new_tokens)
        check_picture_path(self.out)
        image = load_image(self.image or default_picture())
        session = open_session(config, self.dtype, self.device)
        ways = {PLAIN: session}
        if config.speculate != "none":
            ways[EXACT] = replace(session, config=replace(config, pruning=PruningConfig()))
        if pruning.active:
            ways[PRUNED] = session

        console, results = Printer(), []
        total = len(questions) * (len(ways) - 1 + 2 * len(ATTENTIONS) + len(ways) * self.runs)
        with steps("Asking plainly and through the twig", total, last_line=False) as advance:
            for question in questions:
                results.append(self._ask(question, image, ways, advance))
        for question, (answers, attention) in zip(questions, results, strict=True):
            console.print(compare(question, answers, attention))
        console.print(summary([answers for answers, _ in results]))
        picture = show_kept(session, image, results[-1][0][list(ways)[-1]][0])
        if picture is None:
            console.print("No picture written: this model's visual tokens form no square grid.")
            return
        write_picture(picture, self.out)
        console.print(f"Kept patches: {self.out}", markup=False, highlight=False, soft_wrap=True)

    def _ask(
        self, question: str, image: Image.Image, ways: Mapping[str, Session], advance: Callable[[], None]
    ) -> tuple[dict[str, list[Answer]], str]:
        """Timed answers of each way to answer, and the attention implementation of the plain ones."""
        from twigvlm.cli.answer import answer_question
        from twigvlm.inputs import user_turn

        turn = user_turn(question, image)

        def ask(way: str, attention: str | None = None) -> Answer:
            accelerated = way != PLAIN
            answer = answer_question(ways[way], turn, self.max_new_tokens, accelerated=accelerated, attention=attention)
            advance()
            return answer

        for way in list(ways)[1:]:
            ask(way)
        for attention in ATTENTIONS:
            ask(PLAIN, attention)
        speeds = {attention: ask(PLAIN, attention).tokens_per_second for attention in ATTENTIONS}
        fastest = max(speeds, key=lambda attention: speeds[attention])
        answers: dict[str, list[Answer]] = {way: [] for way in ways}
        for _ in range(self.runs):
            for way, given in answers.items():
                given.append(ask(way, fastest if way == PLAIN else None))
        return answers, fastest


def compare(question: str, answers: Mapping[str, Sequence[Answer]], attention: str) -> Table:
    """A table of a question's answers, with medians over the runs. The speed-up is the ratio of tokens per second.

    Args:
        question: the question, which is the title.
        answers: timed answers of each way to answer, plain ones first.
        attention: attention implementation of the plain runs.
    """
    from rich.table import Table
    from rich.text import Text

    first = {way: given[0] for way, given in answers.items()}
    plain = first[PLAIN]
    table = Table(title=Text(question), show_lines=True)
    table.add_column("")
    for way in answers:
        table.add_column(way, ratio=1)
    table.add_row("answer", *(differences(plain.text, answer.text) for answer in first.values()))
    table.add_row("same answer", *("" if way == PLAIN else _same(plain, answer) for way, answer in first.items()))
    table.add_row("visual tokens", *(_visual(answer) for answer in first.values()))
    table.add_row("answer tokens", *(str(answer.num_tokens) for answer in first.values()))
    if any(answer.drafted_lengths for answer in first.values()):
        table.add_row("drafted tokens accepted", *(_accepted(answer) for answer in first.values()))
    for title, name in (("prefill, ms", "prefill_ms"), ("decoding, ms", "decode_ms")):
        table.add_row(title, *(f"{_middle(given, name):.0f}" for given in answers.values()))
    speeds = [_middle(given, "tokens_per_second") for given in answers.values()]
    table.add_row("tokens/s", *(f"{speed:.1f}" for speed in speeds))
    table.add_row("speed-up", *(f"{speed / speeds[0]:.2f}x" for speed in speeds))
    table.caption = f"The plain runs attend by {attention}, the base's faster implementation here."
    return table


def summary(results: Sequence[Mapping[str, Sequence[Answer]]]) -> Text:
    """A summary of the speed-up and the changed answers of each way to answer, over all questions together."""
    from rich.text import Text

    def speed(way: str) -> float:
        tokens = sum(answers[way][0].num_tokens for answers in results)
        seconds = sum(_middle(answers[way], "seconds") for answers in results)
        return tokens / seconds

    lines = []
    for way in results[0]:
        if way == PLAIN:
            continue
        same = sum(answers[way][0].token_ids == answers[PLAIN][0].token_ids for answers in results)
        faster = f"{speed(way) / speed(PLAIN):.2f} times the tokens per second"
        lines.append(f"{way.capitalize()}: {faster}; same answers as the base's: {same} of {len(results)}.")
    return Text("\n".join(lines))


def differences(plain: str, given: str) -> Text:
    """An answer with words that the plain answer lacks in bold, and words that only the plain answer has struck through."""
    from difflib import SequenceMatcher

    from rich.text import Text

    before, after, text = plain.split(), given.split(), Text()
    for tag, start, stop, new_start, new_stop in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag in ("replace", "delete"):
            text.append(" ".join(before[start:stop]) + " ", style="strike red")
        if new_stop > new_start:
            style = "" if tag == "equal" else "bold green"
            text.append(" ".join(after[new_start:new_stop]) + " ", style=style)
    text.rstrip()
    return text


def show_kept(session: Session, image: Image.Image, answer: Answer) -> Image.Image | None:
    """The image with the patches kept for the question and, next to it, those chosen again later; None: no patch grid."""
    from twigvlm.visualize import highlight, seen_box, side_by_side

    if answer.grid is None:
        return None
    box, tokenizer = seen_box(session.processor, image), session.processor.tokenizer
    everything = list(range(answer.visual_tokens))
    sets = [(_visual(answer), everything if answer.kept_indices is None else answer.kept_indices)]
    looks = answer.looks or []
    for look in looks[: PANELS - 1]:
        words = tokenizer.decode(answer.token_ids[: look.after], skip_special_tokens=True).split()
        sets.append((f"after “… {' '.join(words[-4:])}”: {look.ran} chosen again", look.kept_indices))
    captions = [caption for caption, _ in sets]
    if len(looks) >= PANELS:
        captions[-1] += f" (and {len(looks) - PANELS + 1} more times)"
    return side_by_side([highlight(image, kept, answer.grid, box) for _, kept in sets], captions)


def _visual(answer: Answer) -> str:
    if answer.kept_indices is None:
        return f"{answer.visual_tokens} of {answer.visual_tokens}"
    kept = f"{answer.kept_tokens} of {answer.visual_tokens} kept"
    if answer.average_visual is not None:
        kept += f" ({answer.average_visual:.0f} on average over the layers)"
    if answer.looks:
        ran = sum(look.ran for look in answer.looks)
        kept += f"; chosen again {len(answer.looks)} times, {ran} tokens in all"
    return kept


def _same(plain: Answer, answer: Answer) -> str:
    return "yes" if plain.token_ids == answer.token_ids else "no"


def _accepted(answer: Answer) -> str:
    return f"{sum(answer.accepted_lengths or [])} of {sum(answer.drafted_lengths)}" if answer.drafted_lengths else ""


def _middle(answers: Sequence[Answer], name: str) -> float:
    from statistics import median

    return median(getattr(answer, name) for answer in answers)
