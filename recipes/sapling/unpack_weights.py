"""Take the shipped weight file apart again, into runs from which the vision and the language steps can go on.

The dense heads of the tower's training are not shipped: let them learn first, with `--freeze-tower`.

    python -m recipes.sapling.unpack_weights --joint runs/joint --vision runs/vision
"""

from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file

from recipes.sapling.export_weights import Options
from recipes.sapling.language import SCALING, Reader
from recipes.sapling.targets import VisualTargets
from recipes.sapling.vision import DenseVision
from twigvlm.files import replacing
from twigvlm.sapling import assemble


def low_rank_updates(reader: Reader, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a reader learned, from the names that `export_weights.shipped` gave it."""
    updates = {}
    for name in reader.learned():
        module, part = (
            name.removeprefix("language.base_model.model.model.").removesuffix(".default.weight").rsplit(".", 1)
        )
        updates[name] = weights[f"{module}.down"] if part == "lora_A" else weights[f"{module}.up"] / SCALING
    return updates


def main(options: Options) -> None:
    text, language = assemble.tokenizer(), assemble.language_model()
    targets = VisualTargets(language.get_input_embeddings().weight.detach(), text)
    weights = {name: value.float() for name, value in load_file(assemble.weights_file()).items()}
    vision = DenseVision(targets, assemble.config(language, text.convert_tokens_to_ids(assemble.IMAGE_TOKEN)))
    vision.load_state_dict({**vision.state_dict(), **{n: v for n, v in weights.items() if n in vision.state_dict()}})
    states = {
        options.vision: vision.state_dict(),
        options.joint: low_rank_updates(Reader(targets, text, None), weights),
    }
    for folder, state in states.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        with replacing(Path(folder) / "final.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in state.items()}, temporary)


if __name__ == "__main__":
    main(tyro.cli(Options))
