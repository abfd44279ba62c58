"""Two processes train as one does, with copies of the twig or with parts of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from tests.training import runs
from twigvlm.errors import TwigVLMError
from twigvlm.training import processes, sharding

ROOT = Path(__file__).parents[2]


def launched(configuration):
    """What `accelerate launch` would set for a shipped configuration."""
    words = ["--config_file", str(ROOT / "recipes" / "training" / configuration), "script"]
    return prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(words))[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twigs and logs of one process that makes as many passes in a step as two do."""
    model, directory = runs.grow(), tmp_path_factory.mktemp("alone")
    logs = {"stage1": runs.stage1(model, directory / "whole", accumulate=4)}
    twigs = {"stage1": {name: tensor.clone() for name, tensor in model.twig.state_dict().items()}}
    logs["stage2"] = runs.stage2(model, directory / "tuned", accumulate=2)
    twigs["stage2"] = model.twig.state_dict()
    return twigs, logs


@pytest.mark.parametrize("configuration", ["ddp.yaml", "fsdp.yaml"])
def test_two_processes_train_as_one(alone, tmp_path, configuration):
    expected, expected_logs = alone
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, "-m", "tests.training.runs", "together", tmp_path], cwd=ROOT, env=launched(configuration), check=True)
    twigs = [torch.load(tmp_path / f"twigs-{rank}.pt") for rank in range(2)]
    for name, tensor in twigs[0]["stage1"].items():
        assert torch.equal(tensor, twigs[0]["resumed"][name])
    for stage in ("stage1", "stage2"):
        for name, tensor in expected[stage].items():
            torch.testing.assert_close(twigs[0][stage][name], tensor, rtol=1e-4, atol=1e-5)
            assert torch.equal(twigs[0][stage][name], twigs[1][stage][name])
        logs = json.loads((tmp_path / "logs-0.json").read_text())[stage]
        for ours, theirs in zip(logs[:-1], expected_logs[stage], strict=False):
            assert ours.keys() == theirs.keys()
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == {f"twig.{name}" for name in expected["stage1"]}
    for name, tensor in saved.items():
        assert torch.equal(tensor, twigs[0]["stage1"][name.removeprefix("twig.")])
