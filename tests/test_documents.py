"""What the documents say of the code is there, and what the site shows is complete."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from recipes.docs import errors, figures

ROOT = Path(__file__).parents[1]
INDEX = re.findall(r"`((?:src/|tests/)?[\w/]+\.py)(?:: ([^`]+))?`", (ROOT / "docs" / "paper_index.md").read_text())


def names_in(body):
    """What a module or a class defines, to where."""
    defined = {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    assigned += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return defined | {target.id: target for target in assigned if isinstance(target, ast.Name)}


@pytest.mark.parametrize(("file", "names"), sorted(set(INDEX)))
def test_the_paper_s_index_leads_somewhere(file, names):
    path = ROOT / file if file.startswith("tests/") else ROOT / "src" / "twigvlm" / file
    found = names_in(ast.parse(path.read_text()).body)
    for name in re.findall(r"[\w.]+", re.sub(r"\(.*?\)", "", names)):
        outer, _, inner = name.partition(".")
        assert outer in found, name
        if inner:
            assert isinstance(found[outer], ast.ClassDef), name
            assert inner in names_in(found[outer].body), name


def test_the_index_was_read():
    assert len(INDEX) > 40


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path for path in (ROOT / "docs").rglob("*.md")}


def pages_in(entry):
    """The pages that an entry of the site's navigation leads to."""
    if isinstance(entry, str):
        return [entry]
    return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages_in(inner)]


def test_every_page_is_in_the_navigation():
    assert sorted(pages_in(SITE["nav"])) == sorted(PAGES)


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES.values()], ids=lambda path: path.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_figures_are_as_the_code_draws_them(name):
    assert (figures.FOLDER / name).read_text(encoding="utf-8") == figures.FIGURES[name]()


def test_every_message_is_listed_with_a_remedy():
    found = [message for messages in errors.by_area().values() for message in messages]
    assert len(found) > 300
    assert "retain=RETAIN and keep=KEEP: give only one of them" in found
    assert [message for message in found if not errors.split(message)[1]] == []
    section = errors.section()
    assert section.count("| <code>") == len(found)


def test_messages_that_the_page_explains_exist():
    known = "\n".join(message for messages in errors.by_area().values() for message in messages)
    explained = re.findall(r"^\*\*`([^`]+)`", (ROOT / "docs" / errors.PAGE).read_text(), re.MULTILINE)
    assert len(explained) > 8
    for message in explained:
        parts = [re.escape(part.strip(" …")) for part in message.split("…") if part.strip(" …:")]
        assert re.search(".*".join(parts), known), message
