"""A hook of MkDocs: append every error message of the library to the page on troubleshooting.

The messages are read from the source, so that the page is complete. What a message fills in is shown by its name in capitals,
or as "…" where it has none.
"""

import ast
import html
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src" / "twigvlm"
PAGE = "troubleshooting.md"
SHOWN = ("TwigVLMError", "UsageError", "BrokenSample", "RequestError", "NotImplementedError")
"""Errors that users meet. A ValueError is shown only where one of these, or a server, reports it."""
RETURNING = ("refusal_of",)
"""Functions that return a message, which another function raises."""
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
DO = {"call", "choose", "give", "leave", "load", "make", "pass", "put", "shorten", "train", "use", "write"}
"""Words that a remedy begins with."""
AT_END = "Do what the end of the message says."
"""The remedy of messages that end with another one."""
STATEMENTS = {"a", "an", "automatic", "it", "nothing", "only", "the", "training"}
"""Words that begin what stands behind a semicolon and is no remedy."""
Texts = Mapping[str, Sequence[ast.expr]]
"""Name of a constant, a variable or a function -> the texts that it can stand for."""


def texts_of(body: Iterable[ast.stmt]) -> dict[str, list[ast.expr]]:
    """What is assigned exactly once and is a text, and what functions return that are annotated to return one."""
    assigned: dict[str, list[ast.expr]] = defaultdict(list)
    for outer in body:
        inside = [outer] if isinstance(outer, ast.FunctionDef | ast.ClassDef) else ast.walk(outer)
        for node in inside:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    assigned[name].append(value)
                case ast.AugAssign(target=ast.Name(id=name), value=value):
                    assigned[name] += [value, value]
                case ast.FunctionDef(name=name, returns=ast.Name(id="str")):
                    returns = [one for one in ast.walk(node) if isinstance(one, ast.Return)]
                    assigned[name] += [one.value for one in returns if one.value is not None]
    kinds = ast.Constant | ast.JoinedStr | ast.IfExp
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    return {
        name: values
        for name, values in assigned.items()
        if name in functions or (len(values) == 1 and isinstance(values[0], kinds))
    }


def templates(node: ast.expr, texts: Texts) -> list[str]:
    """The texts that a message can have; "…" stands for what is made elsewhere."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name in texts:
            others = {key: values for key, values in texts.items() if key != name}  # no text is part of itself
            return [text for value in texts[name] for text in templates(value, others)]
        case ast.FormattedValue(value=ast.Name() | ast.Attribute() as value):
            found = templates(value, texts)
            name = value.id if isinstance(value, ast.Name) else value.attr
            return [name.strip("_").upper()] if found == ["…"] else found
        case (
            ast.FormattedValue(value=value) | ast.Subscript(value=value)
        ):  # the latter is a text that is cut to a length
            return templates(value, texts)
        case ast.IfExp(body=first, orelse=second):
            return templates(first, texts) + templates(second, texts)
        case ast.JoinedStr(values=parts):
            return ["".join(chosen) for chosen in product(*(templates(part, texts) for part in parts))]
        case ast.BinOp(left=left, right=right):
            return ["".join(chosen) for chosen in product(templates(left, texts), templates(right, texts))]
    return ["…"]


def messages(file: Path) -> Iterator[tuple[int, str]]:
    """The messages in a source file that say something by themselves, with their lines."""
    reported = (*SHOWN, "ValueError") if {"serving", "vllm"} & set(file.parts) else SHOWN
    module = ast.parse(file.read_text(encoding="utf-8"))
    scopes: list[tuple[ast.AST, Texts]] = [(module, texts_of(module.body))]
    while scopes:
        scope, texts = scopes.pop()
        for node in ast.iter_child_nodes(scope):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            scopes.append((node, {**texts, **texts_of(node.body)} if is_function else texts))
            for said in said_by(node, reported):
                for text in templates(said, texts):
                    if says_something(text):
                        yield said.lineno, re.sub("…+", "…", " ".join(text.split()))


def said_by(node: ast.AST, reported: Sequence[str]) -> list[ast.expr]:
    """The messages of an error that is made here, or of a function that returns them."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in reported:
            return [first]
        case ast.FunctionDef(name=name) if name in RETURNING:
            return [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value is not None]
    return []


def by_area() -> dict[str, dict[str, str]]:
    """All messages by the title that they are listed under, in alphabetical order, with their places in the source."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for file in sorted(SOURCE.rglob("*.py")):
        path = file.relative_to(SOURCE).as_posix()
        title = next((title for title, starts in AREAS.items() if path.startswith(starts)), "Others")
        for line, message in messages(file):
            found[title].setdefault(message, f"{path}:{line}")
    return {
        title: dict(sorted(found[title].items(), key=lambda item: item[0].lower()))
        for title in (*AREAS, "Others")
        if found[title]
    }


def split(message: str) -> tuple[str, str]:
    """What the table shows of a message, and what it says to do: "" if it says nothing.

    A remedy stands behind a semicolon, or behind the colon if it begins with a verb. What says how a value must be is a
    remedy too, and its message is shown whole, as is one that ends with another message.
    """
    before, _, last = message.rpartition("; ")
    if before and not says_something(last):
        return message, AT_END
    if before and " must " not in last and last.split()[0] not in STATEMENTS:
        return before, sentence(last)
    name, _, clause = (before or message).rpartition(": ")
    if name and clause.isupper():
        return message, AT_END
    if name and clause.split()[0] in DO:
        return message if before else name, sentence(clause)
    return message, requirement(clause) or requirement(last)


def requirement(clause: str) -> str:
    """A sentence that asks for what a clause says must be; "" if it says nothing of that kind."""
    if clause.startswith(("must be ", "at most ")):
        return sentence(f"give {clause.removeprefix('must be ')}")
    if clause.startswith("must "):
        return sentence(clause.removeprefix("must "))
    if clause.startswith("needs "):
        return sentence(f"it {clause}")
    if clause.startswith(("it needs ", "together at most ")) or " must " in clause:
        return sentence(clause)
    return ""


def says_something(text: str) -> bool:
    """Whether a text is more than what is filled in."""
    return any(letter.islower() for letter in text)


def sentence(text: str) -> str:
    """A text that begins with a capital and ends with a full stop; a command gets no stop, which readers would copy."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if ": pip " in text or text.endswith(("…", ".")) else ".")


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
            lines.append(f"| <code>{problem}</code> | {remedy or '–'} |".replace("`", ""))
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for each page before it is rendered."""
    return f"{markdown}\n{section()}" if page.file.src_uri == PAGE else markdown
