"""Private and version-dependent names of torch, transformers and accelerate, each with the version that it was seen in.

`tests/test_compat.py` holds each of them to what it is for: a new version that renames one fails there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from threading import Lock
from typing import Any, cast

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of torch has oneDNN's linear layer (torch 2.13.0)."""

HAS_ONEDNN_SWITCH = torch.backends.mkldnn.is_available() and hasattr(torch._C, "_set_mkldnn_enabled")
"""Whether oneDNN can be switched off (torch 2.13.0)."""
_switching = Lock()

CACHE = "cache" if Version(version("transformers")) >= Version("5.24") else "past_key_values"
"""What models and their layers call the argument with the cache (transformers 5.24.0 has renamed it)."""


@contextmanager
def without_onednn() -> Iterator[None]:
    """Within this context torch multiplies without oneDNN, in all threads; one thread at a time has it switched off.

    `torch._C._get_mkldnn_enabled` and `._set_mkldnn_enabled` (torch 2.13.0); `torch.backends.mkldnn.flags` sets more than this
    switch and takes longer than a product.
    """
    with _switching:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(before)


def onednn_linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b by oneDNN, without gradients; in float32 `nn.functional.linear` asks the BLAS library instead.

    `torch.ops.mkldnn._linear_pointwise` (torch 2.13.0), which inductor compiles linear layers to.
    """
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], ""))


def has_bfloat16_instructions() -> bool:
    """Whether this CPU computes in bfloat16 faster than in float32.

    `torch.ops.mkldnn._is_mkldnn_bf16_supported` (torch 2.13.0), which is there only with oneDNN.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by `module.compile()` or by `torch.compile(module)`.

    `Module._compiled_call_impl` and `OptimizedModule._orig_mod` (torch 2.13.0).
    """
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def parts(module: nn.Module) -> list[nn.Module]:
    """A module's own submodules; `Module.children` takes several times as long, which counts where it is asked at each step.

    `Module._modules` (torch 2.13.0).
    """
    return [part for part in module._modules.values() if part is not None]


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` wraps; any other one itself.

    `OptimizedModule._orig_mod` (torch 2.13.0).
    """
    return module._modules.get("_orig_mod") or module


def uncompiled_name(name: str) -> str:
    """The name that a parameter has in a model of which no part is compiled.

    `OptimizedModule._orig_mod` (torch 2.13.0).
    """
    return name.replace("_orig_mod.", "")


def attention_implementation(config: Any) -> str:
    """How a model with this config attends: "eager", "sdpa", "flash_attention_2", …

    `PreTrainedConfig._attn_implementation` (transformers 5.23.0); a composite model's language model has one of its own.
    """
    return str(config._attn_implementation)


def checkpoint_gradients(layer: Any, on: bool) -> None:
    """Let a decoder layer keep its input alone in training, and run again for its gradients.

    `GradientCheckpointingLayer.gradient_checkpointing` and `._gradient_checkpointing_func` (transformers 5.23.0), which
    `gradient_checkpointing_enable` sets for whole models.
    """
    layer.gradient_checkpointing = on
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def set_backend_tokenizer(tokenizer: Any, backend: Any) -> None:
    """Exchange the tokenizer of the tokenizers library inside a fast tokenizer of transformers.

    `PreTrainedTokenizerFast._tokenizer` (transformers 5.23.0); its public name `backend_tokenizer` cannot be set.
    """
    tokenizer._tokenizer = backend


def prefix_function(processor: Any) -> Callable[[int, Tensor], list[int]]:
    """The user's `prefix_allowed_tokens_fn` that a logits processor asks.

    `PrefixConstrainedLogitsProcessor._prefix_allowed_tokens_fn` (transformers 5.23.0).
    """
    return cast(Callable[[int, Tensor], list[int]], processor._prefix_allowed_tokens_fn)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a module whose weights may lie elsewhere; None: the one they lie on.

    `Module._hf_hook` (accelerate 1.15.0), an `AlignDevicesHook` or a sequence of hooks, which has no such device.
    """
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return None if device is None else torch.device(device)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Within this context a module's own weights are there, even if accelerate has them on the disk until it is called.

    `Module._hf_hook` and `accelerate.utils.align_module_device` (accelerate 1.15.0).
    """
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
