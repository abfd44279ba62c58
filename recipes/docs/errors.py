"""A hook of MkDocs: append every error message of the library to the page on troubleshooting.

The messages are read from the source, so that the page is complete. What a message fills in is shown by its name in capitals,
or as "…" where it has none.
"""

import ast
import html
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src" / "twigvlm"
PAGE = "troubleshooting.md"
SHOWN = ("TwigVLMError", "UsageError", "BrokenSample", "RequestError")
"""Errors that users meet. A ValueError is shown only where one of these, or a server, reports it."""
AREAS = {
    "Loading a base or a twig": (
        "loading.py",
        "checkpoints/",
        "sapling/",
        "twig/",
        "base/families.py",
        "base/masks.py",
    ),
    "Prompts, pictures and generate": ("base/", "images.py", "inputs.py", "hf/", "model.py", "engine/", "visualize.py"),
    "Options and pruning": ("config.py", "pruning/"),
    "The command line": ("cli/", "files.py"),
    "Training": ("training/",),
    "Evaluation": ("evaluation/",),
    "The server and batch files": ("serving/",),
    "vLLM, Ray and others": ("integrations/",),
}
"""Title -> where its messages are in the source; the first one that fits counts."""
DO = {"call", "choose", "give", "leave", "load", "make", "pass", "put", "shorten", "use"}
"""Words that a remedy begins with."""


def template(node: ast.expr) -> str:
    """The text of a message; "…" if it is made elsewhere."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(template, parts))
        case ast.FormattedValue(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name.strip("_").upper()
        case ast.BinOp(left=left, right=right):
            return template(left) + template(right)
        case ast.Subscript(value=whole):  # a text that is cut to a length
            return template(whole)
    return "…"


def messages(file: Path) -> Iterator[str]:
    """The messages in a source file that say something by themselves, in their order."""
    reported = (*SHOWN, "ValueError") if {"serving", "vllm"} & set(file.parts) else SHOWN
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in reported and node.args:
            text = template(node.args[0])
            if any(letter.islower() for letter in text):
                yield " ".join(text.split())


def by_area() -> dict[str, list[str]]:
    """All messages by the title that they are listed under, in alphabetical order."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in SOURCE.rglob("*.py"):
        path = file.relative_to(SOURCE).as_posix()
        title = next((title for title, starts in AREAS.items() if path.startswith(starts)), "Others")
        found[title].update(messages(file))
    return {title: sorted(found[title], key=str.lower) for title in (*AREAS, "Others") if found[title]}


def split(message: str) -> tuple[str, str]:
    """What is wrong, and what to do about it: behind a semicolon, behind the colon, or what the message says by itself."""
    mark = "; " if "; " in message else ": "
    problem, _, remedy = message.rpartition(mark)
    if problem and remedy and (mark == "; " or remedy.split()[0] in DO):
        return problem, f"{remedy[:1].upper()}{remedy[1:]}."
    return message, "Change it as the message says."


def section() -> str:
    """The list of all messages in Markdown."""
    lines = [
        "## Every message",
        "",
        "Words in capitals and “…” stand for what depends on your input. Search for a few other words of your message.",
    ]
    for title, found in by_area().items():
        lines += ["", f"### {title}", "", "| Message | What to do |", "|---|---|"]
        for message in found:
            problem, remedy = (html.escape(part, quote=False).replace("|", "&#124;") for part in split(message))
            lines.append(f"| <code>{problem}</code> | {remedy} |".replace("`", ""))
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for each page before it is rendered."""
    return f"{markdown}\n{section()}" if page.file.src_uri == PAGE else markdown
