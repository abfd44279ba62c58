"""What the documents say of the code is there."""

import ast
import re
from pathlib import Path

import pytest

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
