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

from recipes.sapling.sections import MADE_FIRST, PAGES, RUNS, Section
from twigvlm import sapling
from twigvlm.checkpoints.twig_files import CONFIG, WEIGHTS
from twigvlm.files import replacing
from twigvlm.sapling import assemble

DOCS = Path("docs/results")
WIDTH = 120  # of the lines that are written
SETTINGS = ("dtype", "device", "number of questions", "threads", "CPU", "torch", "transformers")


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
