import json
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig, Qwen2VLConfig

from tests.tiny import tiny_llava
from twigvlm.cli.export import commands
from twigvlm.cli.main import main
from twigvlm.integrations.vllm.bases import is_readable, rename_weights, vllm_name


def test_the_drafter_and_the_base_are_written_and_the_commands_printed(
    capsys, tmp_path, base_directory, twig_directory
):
    out, base = tmp_path / "drafter", tmp_path / "base"
    arguments = ["export", "vllm", str(out), "--twig", str(twig_directory), "--model", str(base_directory)]
    assert main([*arguments, "--base", str(base), "--tokens", "3"]) == 0
    printed = capsys.readouterr().out
    command = shlex.split(next(line for line in printed.splitlines() if line.startswith("vllm serve")))
    assert command[2:4] == [str(base), "--speculative-config"]
    assert json.loads(command[4]) == {"method": "eagle3", "model": str(out), "num_speculative_tokens": 3}
    compile(printed.partition("In Python:\n")[2], "printed", "exec")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    assert is_readable(base)
    assert {"config.json", "processor_config.json"} <= {file.name for file in base.iterdir()}
    before, after = (load_file(folder / "model.safetensors") for folder in (base_directory, base))
    assert {vllm_name(name, "clip_vision_model") for name in before} == after.keys()
    assert "vision_tower.vision_model.pre_layrnorm.weight" in after
    again = {name: tensor.clone() for name, tensor in after.items()}
    rename_weights(base)  # what is right already stays
    assert all((again[name] == tensor).all() for name, tensor in load_file(base / "model.safetensors").items())


def test_a_sharded_base_has_its_index_renamed(tmp_path):
    tiny_llava().save_pretrained(tmp_path, max_shard_size="40KB")
    assert not is_readable(tmp_path)
    rename_weights(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name in load_file(tmp_path / file) for name, file in index.items())
    assert is_readable(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("'sapling'", "--base")),
        (("--scout-diverse",), ("scout_diverse", "--scout-retain")),
        (("--tokens", "0"), ("tokens=0", "1 or more")),
        (("--scout-retain", "-5"), ("scout_retain=-5", "for example 64")),
        (("--scout-retain", "nan"), ("scout_retain=nan", "for example 64")),
        (("--model", "BASE"), ("--twig",)),
        (("--model", "BASE", "--twig", "TWIG"), ("newer transformers", "--base")),
        (("--model", "BASE", "--twig", "TWIG", "--base", "BASE"), ("exists already",)),
    ],
)
def test_what_vllm_could_not_load_is_refused(refused, tmp_path, base_directory, twig_directory, arguments, words):
    named = {"BASE": base_directory, "TWIG": twig_directory}
    given = [named.get(argument, argument) for argument in arguments]
    refused("export", "vllm", tmp_path / "out", *given, words=words)


def test_scout_mode_is_in_the_instructions(capsys, refused, tmp_path, base_directory, twig_directory):
    arguments = ["export", "vllm", tmp_path / "out", "--twig", twig_directory, "--model", base_directory]
    arguments = [*map(str, arguments), "--base", str(tmp_path / "base")]
    assert main([*arguments, "--scout-retain", "10"]) == 0
    printed = capsys.readouterr().out
    command = shlex.split(next(line for line in printed.splitlines() if "vllm serve" in line))
    assert command[0] == "VLLM_USE_V2_MODEL_RUNNER=0"
    assert "--trust-request-mm-kwargs" not in command  # by which clients could set any option of the processor
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    assert overrides["mrope_section"] == [0, 0, 0]
    settings = overrides["twig_scout"]
    assert settings["prompt"].count("{question}") == settings["prompt"].count("<image>") == 1
    assert (settings["retain"], settings["layers"], settings["trunk_layers"]) == (10, 6, 2)
    compile(printed.partition("In Python:\n")[2], "printed", "exec")


def test_files_of_another_model_are_not_replaced(refused, tmp_path, base_directory, twig_directory):
    arguments = ["export", "vllm", "--twig", twig_directory, "--model", base_directory]
    before = {path: path.read_bytes() for path in Path(base_directory).iterdir()}
    refused(*arguments, base_directory, words=["holds another model", "name another directory"])
    assert {path: path.read_bytes() for path in Path(base_directory).iterdir()} == before
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "notes").touch()
    refused(*arguments, tmp_path / "out", "--base", tmp_path / "base", words=["exists already"])
    assert not (tmp_path / "out").exists()


def test_what_is_written_into_the_base_s_directory_is_refused_before_anything_is_loaded(refused, tmp_path):
    for out in (tmp_path / "base", tmp_path / "base" / "drafter", tmp_path / "other" / ".." / "base" / "drafter"):
        refused(
            "export", "vllm", out, "--model", "nowhere", "--twig", "nowhere", "--base", tmp_path / "base",
            words=["lies in --base, which must be new", "name a directory beside it"],
        )  # fmt: skip
    assert [*tmp_path.iterdir()] == []


def test_what_is_printed_works_from_every_directory(capsys, monkeypatch, tmp_path, base_directory, twig_directory):
    shutil.copytree(base_directory, tmp_path / "own")
    rename_weights(tmp_path / "own")  # one that vLLM reads as it is
    monkeypatch.chdir(tmp_path)
    for model, written in ((str(base_directory), ["--base", "base"]), ("own", [])):
        arguments = ["export", "vllm", "drafter", "--twig", str(twig_directory), "--model", model, *written]
        assert main([*arguments, "--scout-retain", "10"]) == 0
        printed = capsys.readouterr().out
        command = shlex.split(next(line for line in printed.splitlines() if "vllm serve" in line))
        assert command[command.index("serve") + 1] == str(tmp_path / (written or ["own"])[-1])
        speculative, overrides = (
            json.loads(command[command.index(name) + 1]) for name in ("--speculative-config", "--hf-overrides")
        )
        assert speculative["model"] == overrides["twig_scout"]["path"] == str(tmp_path / "drafter")


def test_what_a_base_needs_is_in_the_instructions():
    for config, runner, override in (
        (LlavaConfig(), False, False),
        (LlavaNextConfig(), True, False),
        (Qwen2_5_VLConfig(), True, False),
        (Qwen2VLConfig(), True, True),
    ):
        text = config.get_text_config()
        if config.model_type.startswith("qwen"):
            text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        printed = str(commands("base", "drafter", config, 4))
        assert ("VLLM_USE_V2_MODEL_RUNNER=0 vllm serve base" in printed) == runner
        assert ("--hf-overrides" in printed) == ("hf_overrides={'image_token_index': " in printed) == override
        compile(printed.partition("In Python:\n")[2], "printed", "exec")
