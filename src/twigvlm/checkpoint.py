"""A twig on disk: its own weights (safetensors) and config, with a fingerprint of the base that it grew on."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twigvlm.base.vlm import BaseVLM
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.twig.block import Twig

WEIGHTS = "twig_model.safetensors"
CONFIG = "twig_config.json"
_DIMENSIONS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def save(base: BaseVLM, twig: Twig, path: str | PathLike[str]) -> None:
    """Write a twig to a directory; each file is replaced whole or not at all."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise TwigVLMError(f"{folder}: is a file; name a directory for the twig")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in twig.state_dict().items()}
    replace(folder / WEIGHTS, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))
    text = json.dumps({"twig": dataclasses.asdict(twig.config), "base": fingerprint(base)}, indent=2) + "\n"
    replace(folder / CONFIG, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def load(base: BaseVLM, path: str | PathLike[str]) -> Twig:
    """Read a twig onto its base, in the base's dtype and on its device.

    Raises:
        TwigVLMError: a file is missing or broken, keys or shapes differ from the config's, or the base is another one.
    """
    folder = Path(path)
    config, expected = _read_config(folder / CONFIG)
    difference = compare(expected, fingerprint(base))
    if difference:
        raise TwigVLMError(f"{folder}: this twig grew on another base ({difference}); load the base it was trained on")
    state = _read_weights(folder / WEIGHTS)
    ids = state.get("draft_token_ids")
    if config.draft_vocabulary is not None and ids is None:
        raise TwigVLMError(f"{folder / WEIGHTS}: missing keys draft_token_ids; get the file again")
    twig = Twig(base, config, None if config.draft_vocabulary is None else ids)
    _check_keys(folder / WEIGHTS, state, twig.state_dict())
    twig.load_state_dict(state)
    return twig


def fingerprint(base: BaseVLM) -> dict[str, Any]:
    """Dimensions of a base, and a few weights of tensors from all over it: cheap, and the same in every dtype."""
    dimensions = {name: getattr(base.config, name, None) for name in _DIMENSIONS}
    dimensions["vocab_size"] = int(base.head.weight.shape[0])
    named = sorted(
        (name, tensor)
        for name, tensor in base.model.named_parameters()
        if tensor.ndim >= 2 and tensor.is_floating_point()
    )
    picked = [named[i] for i in _spread(len(named), 24)]
    samples = {}
    for name, tensor in picked:
        flat = tensor.detach().reshape(-1)
        index = torch.tensor(_spread(flat.numel(), 12), device=flat.device)
        samples[name] = [float(f"{value:.6g}") for value in flat[index].float().tolist()]
    return {"model_type": base.model.config.model_type, "dimensions": dimensions, "samples": samples}


def compare(expected: dict[str, Any], actual: dict[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty if nothing does beyond half-precision rounding."""
    if expected["model_type"] != actual["model_type"]:
        return f"model type {expected['model_type']}, this is {actual['model_type']}"
    for name, value in expected["dimensions"].items():
        if actual["dimensions"].get(name) != value:
            return f"{name} {value}, this has {actual['dimensions'].get(name)}"
    shared = expected["samples"].keys() & actual["samples"].keys()  # a quantised base hides some weights
    if not shared:
        return "no weight in common"
    for name in sorted(shared):
        ours, theirs = torch.tensor(expected["samples"][name]), torch.tensor(actual["samples"][name])
        # bfloat16 keeps 8 bits: two roundings differ by at most 2^-8 of a weight, merged updates by that of the scale
        tolerance = (ours.abs() + ours.square().mean().sqrt()) * 2.0**-8
        if ours.shape != theirs.shape or bool(((ours - theirs).abs() > tolerance).any()):
            return f"weights of {name} differ"
    return ""


def _spread(count: int, picks: int) -> list[int]:
    """Up to `picks` indices from 0 to count-1, evenly spaced, ends included."""
    if count <= picks:
        return list(range(count))
    return [round(i * (count - 1) / (picks - 1)) for i in range(picks)]


def _read_config(file: Path) -> tuple[TwigConfig, dict[str, Any]]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TwigVLMError(
            f"{file.parent}: no twig here ({CONFIG} is missing); name a directory made by save_pretrained"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TwigVLMError(f"{file}: cannot be read ({error}); get the file again") from None
    try:
        config = TwigConfig(**record["twig"])
        base = record["base"]
        _ = base["model_type"], base["dimensions"].items(), base["samples"].keys()
    except TwigVLMError as error:
        raise TwigVLMError(f"{file}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise TwigVLMError(f"{file}: not a twig's config ({error}); get the file again or update twigvlm") from None
    return config, base


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise TwigVLMError(f"{file.parent}: {WEIGHTS} is missing; get the file again")
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise TwigVLMError(f"{file}: truncated or not a safetensors file ({error}); get the file again") from None


def _check_keys(file: Path, state: dict[str, Tensor], expected: dict[str, Any]) -> None:
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing keys {', '.join(missing)}")
    if unexpected := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected keys {', '.join(unexpected)}")
    for name in sorted(state.keys() & expected.keys()):
        if state[name].shape != expected[name].shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, not {list(expected[name].shape)}")
    if problems:
        raise TwigVLMError(f"{file}: {'; '.join(problems)}; get the file again")


def replace(file: Path, write: Callable[[str], Any]) -> None:
    """Have a file written beside its place, then put there: it is never seen half."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
