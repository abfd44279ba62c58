"""Join tower, projector and low-rank updates into the weight file that the package ships.

python -m recipes.sapling.export_weights --joint runs/joint --vision runs/vision
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file

from recipes.sapling.language import RANK, SCALING
from twigvlm.files import replacing
from twigvlm.sapling import assemble


def shipped(joint: Path, vision: Path) -> dict[str, torch.Tensor]:
    """Names as `assemble.assemble` reads them, in float16."""
    learned = load_file(joint / "final.safetensors")
    weights = {
        key: value
        for key, value in load_file(vision / "final.safetensors").items()
        if key.startswith(("vision_tower.", "multi_modal_projector."))
    }
    for key, value in learned.items():
        name = key.removeprefix("language.base_model.model.model.").removesuffix(".default.weight")
        module, part = name.rsplit(".", 1)
        weights[f"{module}.{'down' if part == 'lora_A' else 'up'}"] = value if part == "lora_A" else value * SCALING
    assert all(RANK in value.shape for key, value in weights.items() if key.endswith((".up", ".down")))
    return {key: value.to(torch.float16).contiguous() for key, value in weights.items()}


@dataclass
class Options:
    joint: Path
    """Folder of the last language run."""
    vision: Path
    """Folder of the vision run."""


def main(options: Options) -> None:
    with replacing(assemble.weights_file()) as temporary:
        save_file(shipped(options.joint, options.vision), temporary)


if __name__ == "__main__":
    main(tyro.cli(Options))
