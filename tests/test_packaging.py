"""What the packages hold and what they say of themselves, without building them: `make test-wheel` does that."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import twigvlm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "twigvlm"
FILES_OF_A_WHEEL = """
import json, sys
from pathlib import Path
from setuptools.dist import Distribution

distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
distribution.get_command_obj("egg_info").egg_base = sys.argv[1]
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
files = [file for _, _, file in build.find_all_modules()]
files += [Path(folder, name).as_posix() for _, folder, _, names in build.data_files for name in names]
print(json.dumps([distribution.get_version(), files]))
"""


FILES_OF_AN_SDIST = """
import sys
from setuptools.dist import Distribution

distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
distribution.get_command_obj("egg_info").egg_base = sys.argv[1]
distribution.run_command("egg_info")
print("\\n".join(distribution.get_command_obj("egg_info").filelist.files))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Version and files of the wheel that setuptools would build, relative to the repository."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "-c", FILES_OF_A_WHEEL, tmp_path_factory.mktemp("egg")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, files = json.loads(done.stdout.splitlines()[-1])
    return version, set(files)


def test_the_sdist_holds_what_its_tests_read(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "-c", FILES_OF_AN_SDIST, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = set(done.stdout.splitlines())
    read = {
        "/".join(re.findall(r'"([^"]+)"', parts))
        for path in (ROOT / "tests").rglob("*.py")
        for parts in re.findall(r'\bROOT((?: / "[\w.-]+")+)', path.read_text(encoding="utf-8"))
    }
    assert {".pre-commit-config.yaml", ".github/workflows/ci.yml", "Makefile"} <= read
    assert [name for name in read if (ROOT / name).is_file() and name not in files] == []


def test_the_wheel_holds_every_file_of_the_package(wheel):
    there = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert wheel[1] == {path for path in there if "__pycache__" not in path}


def test_the_wheel_holds_sapling_its_twig_and_the_page(wheel):
    needed = ("py.typed", "sapling/sapling.safetensors", "sapling/twig/twig_model.safetensors", "sapling/demo.png")
    needed += ("sapling/twig/twig_config.json", "serving/page/index.html", "serving/page/page.js")
    assert {f"src/twigvlm/{name}" for name in needed} <= wheel[1]


def test_the_version_has_one_place(wheel):
    assert wheel[0] == twigvlm.__version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_documents_name_the_version():
    newest = re.search(r"^## (\d\S*) – (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = (ROOT / "CITATION.cff").read_text()
    assert newest[1] == twigvlm.__version__
    assert re.search(r"^version: (\S+)$", cited, re.MULTILINE)[1] == twigvlm.__version__
    assert re.search(r"^date-released: (\S+)$", cited, re.MULTILINE)[1] == newest[2]


def test_ruff_is_the_same_everywhere():
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert set(re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())) == {pinned}
