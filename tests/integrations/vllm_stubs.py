"""Stand-ins for what the plug-in imports of vLLM, so that its classes can be tried without it."""

import ast
import contextlib
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

from torch import nn

PLUGIN = Path(__file__).parents[2] / "src" / "twigvlm" / "integrations" / "vllm"
WITH_VLLM = ("drafter", "scout", "scout_llava", "scout_qwen")


class _Anything(nn.Module):
    """A class to inherit from, and a decorator that changes nothing."""

    def __init__(self, *_, **__):
        super().__init__()

    def forward(self, decorated):
        return decorated


class _Stub(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Anything,), {})
        setattr(self, name, made)
        return made


def _imported():
    for name in WITH_VLLM:
        for node in ast.walk(ast.parse((PLUGIN / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("vllm"):
                yield node.module


@contextlib.contextmanager
def stubbed(**classes):
    """The plug-in's modules on stand-ins for vLLM: `stubbed(LlavaForConditionalGeneration=Mine)` as a name -> module function."""
    names = {"vllm"} | {
        ".".join(name.split(".")[:end]) for name in _imported() for end in range(1, name.count(".") + 2)
    }
    ours = [f"twigvlm.integrations.vllm.{name}" for name in WITH_VLLM]
    before = {name: sys.modules.pop(name, None) for name in (*names, *ours)}
    for name in names:
        sys.modules[name] = _Stub(name)
        vars(sys.modules[name]).update(classes)
    registry = SimpleNamespace(register_processor=lambda *_, **__: lambda decorated: decorated)
    sys.modules["vllm.multimodal"].MULTIMODAL_REGISTRY = registry
    sys.modules["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: False)
    try:
        yield lambda name: import_module(f"twigvlm.integrations.vllm.{name}")
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
