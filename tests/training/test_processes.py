"""Two processes train as one does, with copies of the twig or with parts of it; what is killed goes on as if it had not been."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from tests.training import runs
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigVLM
from twigvlm.training.checks import check_device
from twigvlm.training.distributed import fsdp, processes

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
    tiny_llava().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    broken = {"id": "empty"}
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": talk}] * 4 + [broken]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.training.runs", "together", tmp_path],
        cwd=ROOT,
        env=launched(configuration),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Twig: twig\n"
    for line in ("skipped sample 'empty'", "skipped 1 of 5 samples", "step 1/2", "step 2/2"):
        assert done.stderr.count(line) == 1, done.stderr
    TwigVLM.from_pretrained(tiny_llava(), tmp_path / "twig")
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


def test_killed_at_any_write_it_ends_as_if_it_had_not_been(tmp_path):
    subprocess.run([sys.executable, "-m", "tests.training.runs", "killed", tmp_path], cwd=ROOT, check=True)
    model = runs.grow()
    runs.stage1(model, tmp_path / "whole", accumulate=1)
    killed = torch.load(tmp_path / "twig.pt")
    assert all(torch.equal(tensor, killed[name]) for name, tensor in model.twig.state_dict().items())
    assert {path.name for path in (tmp_path / "run").glob("[!.]*")} == {"checkpoint-2", "checkpoint-3", "settings.json"}


def test_without_others_there_is_nothing_to_shard(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TwigVLMError, match="FSDP: there is only one process; start more"):
        runs.stage1(runs.grow(), tmp_path)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"fsdp_version": 1, "reshard_after_forward": "FULL_SHARD"}, "fsdp_version: 2"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy: NO_WRAP"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type: FULL_STATE_DICT"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"cpu_offload": True}, "fsdp_offload_params: false"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing: false"),
    ],
)
def test_sharding_otherwise_is_refused(monkeypatch, options, remedy):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes to it
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", **options})
    state = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    with pytest.raises(TwigVLMError, match=remedy):
        fsdp.set_up(SimpleNamespace(state=state))


def test_a_number_format_is_the_bases_own(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model = TwigVLM.grow(tiny_llava().bfloat16(), TwigConfig(1, 2, pruning_head=True))
    with pytest.raises(TwigVLMError, match=r"mixed_precision=bf16: .* launch with 'no' and choose a dtype"):
        runs.stage1(model, tmp_path)
    assert {parameter.dtype for parameter in model.twig.parameters()} == {torch.bfloat16}


def test_a_run_goes_on_with_as_many_processes_and_settings_it_knew(monkeypatch, tmp_path):
    runs.stage1(runs.grow(), tmp_path, max_steps=1)
    file = tmp_path / "settings.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: known[name] for name in known if name != "gradient_checkpointing"}))
    runs.stage1(runs.grow(), tmp_path, resume=True, max_steps=1, gradient_checkpointing=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TwigVLMError, match=r"processes=2: the checkpoint in .* was trained with 1"):
        runs.stage1(runs.grow(), tmp_path, resume=True, max_steps=1)


def test_the_base_is_where_the_twig_is_trained():
    check_device(torch.device("cuda:0"), torch.device("cuda"))
    with pytest.raises(
        TwigVLMError, match=r"device 'cuda:1': this process trains on 'cuda:0'; .* CUDA_VISIBLE_DEVICES"
    ):
        check_device(torch.device("cuda:0"), torch.device("cuda:1"))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes.device("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [processes.device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(TwigVLMError, match="device 'cuda:0': is the same for all 2 processes; use auto"):
        processes.device("cuda:0")
