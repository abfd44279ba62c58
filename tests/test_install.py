"""The line that `make` shows while pip installs."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAID = """Looking in links: /wheels
Collecting torch==2.13.0 (from -c constraints.txt)
  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl.metadata (29 kB)
Collecting filelock (from torch)
  Using cached filelock-4.2.11-py3-none-any.whl (16 kB)
Requirement already satisfied: numpy>=1.26 in ./lib (from twigvlm)
Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (188.1 MB)
Installing collected packages: filelock, torch
Successfully installed filelock-4.2.11 torch-2.13.0
"""


@pytest.fixture(scope="module")
def install():
    spec = spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_line_says_what_is_done_and_how_much(install):
    progress, lines = install.Progress("1 of 3: PyTorch"), []
    for line in SAID.splitlines(keepends=True):
        progress.read(line)
        lines.append(progress.text(65.2))
    assert lines[0] == "1 of 3: PyTorch: looking for packages, 0 found so far, 1:05"
    assert lines[4] == "1 of 3: PyTorch: fetching filelock (16 kB), 2 found so far, 1:05"
    assert lines[6] == "1 of 3: PyTorch: fetching torch (188.1 MB), 3 found so far, 1:05"
    assert lines[-1] == "1 of 3: PyTorch: unpacking 2 packages, 3 found so far, 1:05"


@pytest.mark.parametrize(("code", "ending"), [(0, "done, 3 packages,"), (3, "failed")])
def test_no_flood_where_no_terminal_is_and_all_of_it_on_failure(install, capfd, code, ending):
    pip = [sys.executable, "-S", "-c", f"import sys; print({SAID!r}, end=''); sys.exit({code})"]
    assert install.show("PyTorch", pip) == code
    out, err = capfd.readouterr()
    assert re.fullmatch(rf"PyTorch …\nPyTorch: {ending} after \d+:\d\d\n", out)
    assert err == (SAID if code else "")
