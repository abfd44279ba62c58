"""Sapling exported for vLLM, and engines of vLLM; in an environment with vLLM alone: `make test-vllm`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["*.py"]

ROOT = Path(__file__).parents[2]
TOKENS = 4
"""Drafted per step."""


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Directories of the drafter and the base, by the command line."""
    from twigvlm.cli.main import main

    folder = tmp_path_factory.mktemp("exported")
    out, base = folder / "drafter", folder / "base"
    assert main(["export", "vllm", str(out), "--base", str(base), "--dtype", "float32"]) == 0
    return out, base


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Files of scenes like those that Sapling knows: its own, turned and cut."""
    from PIL import Image, ImageOps

    folder = tmp_path_factory.mktemp("pictures")
    scene = Image.open(ROOT / "src" / "twigvlm" / "sapling" / "demo.png").convert("RGB")
    width, height = scene.size
    made = [scene, ImageOps.mirror(scene), ImageOps.flip(scene), scene.rotate(90), scene.rotate(180)]
    for left, top in ((0, 0), (width // 4, 0), (0, height // 4), (width // 4, height // 4)):
        made.append(scene.crop((left, top, left + 3 * width // 4, top + 3 * height // 4)))
    paths = []
    for number, picture in enumerate(made):
        paths.append(folder / f"{number}.png")
        picture.save(paths[-1])
    return [str(path) for path in paths]


@pytest.fixture(scope="session")
def engine(exported, pictures, tmp_path_factory):
    """Run jobs in an engine of vLLM: `engine(jobs, tokens=4, environment={}, **options of LLM)`."""
    out, base = exported

    def run(jobs, tokens=TOKENS, environment=(), **options):
        folder, files = tmp_path_factory.mktemp("engine"), options.pop("pictures", pictures)
        settings = {"model": str(base), "dtype": "float32", "limit_mm_per_prompt": {"image": 2}, **options}
        if tokens:
            drafter = options.pop("drafter", str(out))
            settings["speculative_config"] = {"method": "eagle3", "model": drafter, "num_speculative_tokens": tokens}
            settings.pop("drafter", None)
        (folder / "jobs.json").write_text(json.dumps({"engine": settings, "pictures": files, "jobs": jobs}))
        command = [sys.executable, "-m", "tests.vllm.engine_process", folder / "jobs.json", folder / "results.json"]
        path = os.pathsep.join([str(ROOT / "tests" / "vllm" / "site"), str(ROOT)])
        variables = {**os.environ, "PYTHONPATH": path, **dict(environment)}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=3000)
        if done.returncode:
            raise RuntimeError(done.stderr[-20000:])
        return json.loads((folder / "results.json").read_text())

    return run
