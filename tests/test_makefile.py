"""The Makefile names tests that exist, and tries the versions that the package promises."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]


def test_the_tests_it_names_exist():
    named = re.findall(r"tests/[\w/.]+", (ROOT / "Makefile").read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_is_promised_is_what_is_tried(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = ["make", "--dry-run", f"VERSIONS_DIR={tmp_path}", "test-versions"]
    tried = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for library in ("torch", "transformers"):
        (lowest,) = (text.split(">=")[1] for text in project["dependencies"] if text.startswith(f"{library}>="))
        assert f" {library}=={lowest} " in tried
    pythons = [text.rpartition(" ")[2] for text in project["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert pythons
    assert set(re.findall(r"(\S+)/bin/python -m pytest", tried)) == {f"{tmp_path}/{python}" for python in pythons}
