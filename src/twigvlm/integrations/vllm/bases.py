"""Write bases in a form that vLLM loads: transformers 5.20 and later give some weights names that vLLM does not know."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing, writing

_FLAT_TOWER = re.compile(r"((?:model\.)?vision_tower\.)((?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..+)")
"""Weights of a CLIP or SigLIP tower without the level `vision_model` in their names, as transformers 5.20 and later save them."""
_NESTED = ("clip_vision_model", "siglip_vision_model")
"""Model types of towers whose weights vLLM 0.32 expects with that level."""


def vllm_name(name: str, tower: str | None) -> str:
    """A weight's name as vLLM 0.32 knows it.

    Args:
        name: the weight's name in a base's file.
        tower: model type of the base's vision tower.
    """
    match = _FLAT_TOWER.fullmatch(name) if tower in _NESTED else None
    return name if match is None else f"{match[1]}vision_model.{match[2]}"


def is_readable(folder: Path) -> bool:
    """Whether vLLM 0.32 finds all weights of a base's directory under the names that it knows."""
    tower = _tower_of(folder)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            if any(vllm_name(name, tower) != name for name in reader.keys()):  # noqa: SIM118 (not a dict)
                return False
    return True


def save_base(model: Any, processor: Any, path: str | Path) -> Path:
    """Write a base and its processor to a directory that vLLM loads.

    Args:
        model: Hugging Face model.
        processor: its processor.
        path: the directory, new or empty.

    Raises:
        TwigVLMError: the directory is not empty, or cannot be written to.
    """
    folder = Path(path)
    check_new(folder)
    with writing(str(folder)):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    rename_weights(folder)
    return folder


def check_new(folder: Path) -> None:
    """Raise TwigVLMError if a directory for a base already contains files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TwigVLMError(f"base {str(folder)!r}: exists already; choose another directory")


def rename_weights(folder: Path) -> None:
    """Rename the weights in a base's directory to the names that vLLM 0.32 knows, in place."""
    tower = _tower_of(folder)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            metadata, names = reader.metadata(), list(reader.keys())
        if all(vllm_name(name, tower) == name for name in names):
            continue
        tensors = {vllm_name(name, tower): tensor for name, tensor in load_file(file).items()}
        with replacing(file) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {vllm_name(name, tower): file for name, file in content["weight_map"].items()}
        with replacing(index) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tower_of(folder: Path) -> str | None:
    config = folder / "config.json"
    if not config.is_file():
        return None
    vision = json.loads(config.read_text(encoding="utf-8")).get("vision_config") or {}
    found = vision.get("model_type")
    return None if found is None else str(found)
