"""What the documents say of the code is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INDEX = re.findall(r"`((?:src/|tests/)?[\w/]+\.py)(?:: ([^`]+))?`", (ROOT / "docs" / "paper_index.md").read_text())


@pytest.mark.parametrize(("file", "names"), sorted(set(INDEX)))
def test_the_paper_s_index_leads_somewhere(file, names):
    path = ROOT / file if file.startswith("tests/") else ROOT / "src" / "twigvlm" / file
    text = path.read_text()
    for name in re.findall(r"[\w.]+", re.sub(r"\(.*?\)", "", names)):
        outer, _, inner = name.partition(".")
        assert re.search(rf"^(?:class|def) {outer}\b|^{outer}\b.* =", text, re.MULTILINE), name
        if inner:
            assert re.search(rf"^    (?:def {inner}\b|{inner}\b.*[:=])", text, re.MULTILINE), name


def test_the_index_was_read():
    assert len(INDEX) > 40
