"""Each extra brings what its part of the library needs: tried with the packages of the base installation and that extra alone."""

import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from twigvlm.diagnosis import EXTRAS

SOURCE = Path(__file__).parents[1] / "src"
TRAINING = """
import json, sys
from pathlib import Path
from torch import nn
from transformers import TrainingArguments
from twigvlm.compat.trainer import StagedTrainer
from twigvlm.training.data.load import load_samples

folder = Path(sys.argv[1])
turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
(folder / "samples.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
assert len(load_samples(folder / "samples.json")) == 1
StagedTrainer(nn.Linear(2, 2), TrainingArguments(str(folder), report_to="tensorboard", use_cpu=True))
"""
USED = {
    "": "from twigvlm.cli.main import main; main(['methods'])",
    # What transformers asks for before it reads the language model's file, which takes long; `make test-wheel` reads it.
    "sapling": "from transformers.utils import *; assert is_gguf_available() and is_accelerate_available()",
    "train": TRAINING,
    "serve": "import twigvlm.serving.app, twigvlm.serving.server, llguidance",
    "report": "from twigvlm.evaluation.figures import figure_class; figure_class()",
}
"""Extra -> what to run with it. Those of Ray, lmms-eval and vLLM have environments and tests of their own."""


def with_dependencies(name: str, extras: frozenset[str], found: dict[str, Distribution]) -> None:
    """Add an installed package, and all that it asks for with `extras`, to `found`."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return  # not for this platform, or the test is about to say so
    found[name] = package
    for text in package.requires or ():
        needed = Requirement(text)
        if any(needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            within = frozenset(needed.extras)
            if needed.name not in found or within:
                with_dependencies(needed.name, within, found)


def environment(folder: Path, extra: str) -> None:
    """Links in `folder` to the installed files of twigvlm's dependencies with one extra, and to nothing else."""
    packages: dict[str, Distribution] = {}
    with_dependencies("twigvlm", frozenset({extra}), packages)
    for package in packages.values():
        root = Path(str(package.locate_file("")))
        for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(root / name)


@pytest.mark.parametrize("extra", USED)
def test_an_extra_brings_all_that_its_part_needs(extra, tmp_path):
    environment(tmp_path, extra)
    # -S: the interpreter's own site-packages stay out
    command = [sys.executable, "-S", "-c", USED[extra], str(tmp_path)]
    paths = {"PYTHONPATH": f"{SOURCE}:{tmp_path}", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=paths, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_extra_is_forgotten():
    assert set(USED) | {"ray", "lmms-eval", "vllm"} == {"", *EXTRAS}
