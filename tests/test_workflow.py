"""Continuous integration runs targets of the Makefile that exist, and every one that tests a part."""

import re
from itertools import product
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
MAKEFILE = (ROOT / "Makefile").read_text()
BY_HAND = {"test-fast", "test-vllm", "test-versions"}
"""Targets that it does not run: a part of `test`, a quarter of an hour and 4 GB, and what its job `versions` runs one by one."""


def targets_run():
    """What every job makes, with each value of its matrix."""
    for job in JOBS.values():
        matrix = {
            name: values for name, values in job.get("strategy", {}).get("matrix", {}).items() if name != "exclude"
        }
        for values in product(*matrix.values()):
            for step in job["steps"]:
                text = step.get("run", "")
                for name, value in zip(matrix, values, strict=True):
                    text = re.sub(r"\${{ *matrix\." + name + " *}}", value, text)
                yield from re.findall(r"\bmake ([\w.-]+)", text)


def test_every_target_exists():
    rules = re.findall(r"^([\w.%-]+):", MAKEFILE, re.MULTILINE)
    patterns = [re.compile(re.escape(rule).replace("%", ".+")) for rule in rules]
    found = set(targets_run())
    assert {"test", "test-page", "test-lowest-on-python-3.11"} <= found
    assert [target for target in found if not any(pattern.fullmatch(target) for pattern in patterns)] == []


def test_every_part_is_tested():
    parts = set(re.findall(r"^(test(?:-\w+)?):", MAKEFILE, re.MULTILINE))
    assert parts - BY_HAND - set(targets_run()) == set()
