"""Measure the shipped weights and write docs/results/ from what comes out.

    make results
    python -m recipes.sapling.results --pages speed

What a page says above its first heading is written by hand and kept; all below it is made here. Each command keeps its raw
results in `runs/results` and goes on where it was stopped. Speeds want an idle machine.
"""

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from twigvlm import sapling
from twigvlm.checkpoints.twig_files import CONFIG, WEIGHTS
from twigvlm.files import replacing
from twigvlm.sapling import assemble

DOCS = Path("docs/results")
RUNS = "runs/results"
SHORT, LONG = f"{RUNS}/short", f"{RUNS}/long"
VALIDATION, MIXED, MANY = f"{RUNS}/validation", f"{RUNS}/mixed", f"{RUNS}/long100"
WIDTH = 120  # of the lines that are written
SETTINGS = ("dtype", "device", "number of questions", "threads", "CPU", "torch", "transformers")


@dataclass(frozen=True)
class Section:
    title: str
    says: str
    """What is measured, in one sentence."""
    command: str
    """`twigvlm evaluate …` or `twigvlm compare …`, to which its --output is added, or a recipe that prints a table."""


def _evaluate(what: str, questions: str, options: str) -> str:
    return f"twigvlm evaluate {what} --questions {questions}/questions.json {options}"


_QUESTIONS = "recipes.sapling.questions --evaluation --split"
TRAINING, SCHEDULE = f"{RUNS}/training", f"{RUNS}/schedule"
MADE_FIRST = {
    f"{SHORT}/questions.json": f"{_QUESTIONS} test --count 1000 --descriptions 0 --output {SHORT}",
    f"{LONG}/questions.json": f"{_QUESTIONS} test --count 0 --descriptions 200 --long 25 --output {LONG}",
    f"{MANY}/questions.json": f"{_QUESTIONS} test --count 0 --descriptions 100 --long 100 --output {MANY}",
    f"{MIXED}/questions.json": f"{_QUESTIONS} test --count 60 --descriptions 0 --output {MIXED}",
    f"{VALIDATION}/questions.json": f"{_QUESTIONS} validation --count 160 --descriptions 40 --long 10 --output {VALIDATION}",
    f"{TRAINING}/conversations.json": f"recipes.sapling.questions --split train --count 2000 --output {TRAINING}",
    f"{SCHEDULE}/fitprune.json": f"twigvlm train fitprune --data {TRAINING}/conversations.json --out {SCHEDULE} --retain 64",
}
"""Files that sections need -> the module that makes them, with its options."""
METHODS = (
    "twig diverse diverse+refocus:0.7 scout attention fastv pyramiddrop sparsevlm sparsevlm-v2 mustdrop "
    f"fitprune:{SCHEDULE} visionzip fastervlm divprune scope dart vispruner cdpruner prunesid holov "
    "prumerge+ random:0"
)
PAGES = {
    "sapling": [
        Section(
            "Sprites that training saw",
            "Scenes of the test split, greedy, no pruning.",
            "python -m recipes.sapling.evaluate --questions 300 --descriptions 30 --long 8",
        ),
        Section(
            "Sprites of another style",
            "The same kinds of things as another artist draws them, in the scenes that need no other.",
            "python -m recipes.sapling.evaluate --questions 120 --descriptions 12 --long 4 --style emojione",
        ),
    ],
    "accuracy": [
        Section(
            "Short answers",
            "The shipped twig: the tokens with the highest scores, and those that also differ from each other (`diverse`). "
            "Beside it the two methods without training that come nearest to it.",
            _evaluate("accuracy", SHORT, "--methods twig diverse cdpruner divprune --budgets 192 64 48"),
        ),
        Section(
            "Long answers",
            "Choices made once at the end of the prompt, and a choice that is made again while the answer grows.",
            _evaluate("accuracy", LONG, "--methods twig diverse diverse+refocus:0.7 --budgets 192 128 64"),
        ),
        Section(
            "When to choose again, on the validation split",
            "With a lower τ, tokens are chosen again less often.",
            _evaluate(
                "accuracy",
                VALIDATION,
                "--kinds description rows halves 'all signs' 'three questions' "
                "--methods twig diverse refocus:0.7 diverse+refocus:0.7 refocus:0.8 diverse+refocus:0.8 refocus:0.9 --budgets 64",
            ),
        ),
        Section(
            "What late layers see, on the validation split",
            "Short answers and descriptions; with φ = 0 no picture at all behind layer K_f, as published.",
            _evaluate(
                "sweep",
                VALIDATION,
                "--kinds place where relation exists count 'sign text' 'sign colour' 'next to' description "
                "--method diverse --final-wipes 24 30 --final-shares 0 0.15 0.3 --budgets 64",
            ),
        ),
        Section(
            "Which layers know what matters, on the validation split",
            "Short answers, pruned by the base's own attention after a full pass: what the P-Head can learn from one deep layer, "
            "and from the mean of several.",
            _evaluate(
                "accuracy",
                VALIDATION,
                "--kinds place where relation exists count 'sign text' 'sign colour' 'next to' "
                "--methods deep:15 deep:18 deep:21 deep:24 deep:15-24 --budgets 64",
            ),
        ),
        Section(
            "Scout mode and the cut after layer K: short answers",
            "The twig's ranking as the method uses it, and before the decoder, as serving engines need it.",
            _evaluate("accuracy", SHORT, "--methods twig scout --budgets 64"),
        ),
        Section(
            "Scout mode and the cut after layer K: descriptions",
            "The same of 100 descriptions.",
            _evaluate("accuracy", LONG, "--kinds description --limit 100 --methods twig scout --budgets 64"),
        ),
        Section(
            "Budgets fitted to the question",
            "Short answers: as many tokens as hold a share of the twig's scores, against as many for every question; the "
            "share is calibrated on the other half of the questions.",
            f"python -m recipes.sapling.fitted --questions {SHORT}/questions.json --output {RUNS}/fitted --budgets 192 128 64 48",
        ),
    ],
    "speed": [
        Section(
            "Descriptions and other long answers",
            "One prompt at a time.",
            _evaluate(
                "speed",
                LONG,
                "--kinds description rows halves --limit 20 --repeats 1 --refocus 0.7 --budgets 64 "
                "--systems chain auto 'pruning + auto' 'diverse + auto' 'diverse + refocus + auto'",
            ),
        ),
        Section(
            "Short answers",
            "One prompt at a time.",
            _evaluate(
                "speed", SHORT, "--kinds --limit 40 --repeats 1 --budgets 64 --systems chain auto 'pruning + auto'"
            ),
        ),
    ],
    "compare": [
        Section(
            "All methods under the same budgets",
            "Every published method that this project has, and the twig.",
            f"twigvlm compare --questions {MIXED}/questions.json --methods {METHODS} --budgets 192 128 64 --timed 0",
        ),
        Section(
            "Speed of the best, with the quality of the same answers",
            "Descriptions, one prompt at a time, with the twig's drafts and without.",
            f"twigvlm compare --questions {LONG}/questions.json --kinds description --limit 12 "
            "--methods twig diverse cdpruner divprune --budgets 64 --speculate none auto --timed 12 --no-figure",
        ),
    ],
    "exactness": [
        Section(
            "Long answers, with refocusing",
            "Every way to draft against no drafts, token for token; kept tokens are exchanged while the answers grow.",
            _evaluate("exactness", LONG, "--limit 10 --refocus 0.7 --budgets 64"),
        ),
        Section(
            "More long answers, with refocusing",
            "The same, for the pruned answers alone, of descriptions and of the four other long kinds.",
            _evaluate(
                "exactness",
                MANY,
                "--refocus 0.7 --budgets 64 --checks 'pruned chain' 'pruned tree' 'pruned auto' 'pruned lookup'",
            ),
        ),
    ],
}


def folder_of(page: str, number: int) -> Path:
    """Where a section's command keeps its raw results and its report."""
    return Path(RUNS) / f"{page}-{number}"


def whole(section: Section, folder: Path) -> str:
    """A section's command as it runs, and as its page shows it."""
    return f"{section.command} --output {folder}" if section.command.startswith("twigvlm ") else section.command


def measure(command: str, folder: Path) -> str:
    """Run a command from `whole`; what it found, as markdown.

    The library's own commands go on where they were stopped, and refuse results of other settings. A recipe that prints a
    table is not run again if it has finished before; the command stands beside its report, and another one replaces both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report, finished = folder / "report.md", folder / "command"
    words = shlex.split(command)
    if words[0] == "twigvlm":
        subprocess.run([sys.executable, "-m", *words], check=True)
        return evaluated(report.read_text(encoding="utf8"))
    if not (report.exists() and finished.exists() and finished.read_text(encoding="utf8") == command):
        finished.unlink(missing_ok=True)
        printed = subprocess.run([sys.executable, *words[1:]], check=True, stdout=subprocess.PIPE, text=True).stdout
        table = "\n".join(line for line in printed.splitlines() if line.startswith("|"))
        for path, text in ((report, table), (finished, command)):
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf8")
    return report.read_text(encoding="utf8")


def evaluated(report: str) -> str:
    """The sections of an evaluation's report, one heading lower, and what it was measured on in a line."""
    about, *sections = re.split(r"^## ", report, flags=re.MULTILINE)
    settings = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", about, flags=re.MULTILINE))
    line = ", ".join(f"{name} {settings[name]}" for name in SETTINGS if name in settings)
    return "\n\n".join([f"*Measured with: {line}.*", *(f"### {section.strip()}" for section in sections)])


def with_figure(figures: str, folder: Path, name: str) -> str:
    """Figures whose picture, if a command has drawn one, lies beside the pages under this name."""
    picture = folder / "figure.png"
    if not picture.exists():
        return figures
    shutil.copyfile(picture, DOCS / f"{name}.png")
    return figures.replace("(figure.png)", f"({name}.png)")


fill = partial(textwrap.fill, width=WIDTH, break_long_words=False, break_on_hyphens=False)


def wrapped(text: str) -> str:
    """With paragraphs in lines of `WIDTH`; tables, headings and pictures stay as they are."""

    def filled(line: str) -> str:
        if line.startswith(("|", "#", "!")):
            return line
        return fill(line, subsequent_indent="  " if line.startswith("- ") else "")

    return "\n".join(map(filled, text.splitlines()))


def continued(command: str) -> str:
    """A command in lines of `WIDTH`."""
    lines: list[str] = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH - 3:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def opening(section: Section, folder: Path) -> str:
    """What a section of a page begins with: its title, what it says, and its command."""
    return f"## {section.title}\n\n{fill(section.says)}\n\n```bash\n{continued(whole(section, folder))}\n```"


def shown(section: Section, folder: Path, figures: str) -> str:
    """A section of a page."""
    return f"{opening(section, folder)}\n\n{wrapped(figures.strip())}"


def write(page: str, sections: list[str]) -> None:
    """Replace all from the first heading on."""
    path = DOCS / f"{page}.md"
    by_hand = re.split(r"^## ", path.read_text(encoding="utf8"), maxsplit=1, flags=re.MULTILINE)[0]
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join([by_hand.strip(), *sections]) + "\n", encoding="utf8")


@dataclass(frozen=True)
class Options:
    pages: tuple[str, ...] = tuple(PAGES)


def main(options: Options) -> None:
    for page in options.pages:
        if page not in PAGES:
            raise SystemExit(f"page {page!r}: must be one of {', '.join(PAGES)}")
    files = (assemble.weights_file(), *(sapling.twig_path() / name for name in (WEIGHTS, CONFIG)))
    weights = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    stamp = Path(RUNS) / "weights"
    if stamp.exists() and stamp.read_text() != weights:
        raise SystemExit(f"{RUNS}: holds figures of other weights; delete it")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(weights)
    for made, making in MADE_FIRST.items():
        if not Path(made).exists():
            subprocess.run([sys.executable, "-m", *shlex.split(making)], check=True)
    for page in options.pages:
        found = []
        for number, section in enumerate(PAGES[page]):
            folder = folder_of(page, number)
            figures = with_figure(measure(whole(section, folder), folder), folder, folder.name)
            found.append(shown(section, folder, figures))
        write(page, found)


if __name__ == "__main__":
    main(tyro.cli(Options))
