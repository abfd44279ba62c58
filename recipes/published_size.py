"""What pruning saves, and what drafts and verifications cost, on a model as large as LLaVA-1.5-7B with random weights.

    python -m recipes.published_size

Times do not depend on what the weights are, but which drafts are accepted does: no speed-up of speculation is measured.
"""

import json
import statistics
from dataclasses import asdict, dataclass

import torch
import tyro
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from twigvlm.config import TwigConfig
from twigvlm.evaluation.report import table
from twigvlm.evaluation.speed import in_turn, measure
from twigvlm.evaluation.systems import System
from twigvlm.model import TwigVLM
from twigvlm.speculation.costs import NODES, calibrate

BUDGETS = (192.0, 128.0, 64.0)
IMAGE, SIDE = 32000, 336  # the picture's placeholder, and its pixels a side
TEXT, NEW = 60, 64  # tokens
DECODER = {
    "vocab_size": 32064,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}
TOWER = {
    "image_size": SIDE,
    "patch_size": 14,
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
}


@dataclass(frozen=True)
class Options:
    device: str = "cuda"
    repeats: int = 5
    """Runs of each system, alternating; the median counts. One more warms up."""


def build(device: str) -> TwigVLM:
    """LLaVA-1.5 with a twig of the published shape, all weights random."""
    text, vision = LlamaConfig(**DECODER), CLIPVisionConfig(**TOWER)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return TwigVLM.grow(model, TwigConfig(final_wipe=DECODER["num_hidden_layers"] * 3 // 4, pruning_head=True))


def main(options: Options) -> None:
    model = build(options.device)
    visual = (SIDE // TOWER["patch_size"]) ** 2
    ids = torch.randint(3, 1000, (1, TEXT))
    ids = torch.cat((ids[:, :1], torch.full((1, visual), IMAGE), ids[:, 1:]), dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    inputs = {name: value.to(options.device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    systems = [System("HF generate, sdpa", "sdpa"), System("own loop")]
    systems += [System(f"pruning, R̄ = {budget:g}", options={"retain": budget}, method="twig") for budget in BUDGETS]
    runs: dict[str, list[tuple[float, float]]] = {system.name: [] for system in systems}
    for turn in range(options.repeats + 1):
        for system in in_turn(systems, turn):
            one = measure(model, inputs, system, NEW)
            runs[system.name].append((one.prefill, one.total - one.prefill))
    rows = []
    for name, times in runs.items():
        prefill, decode = (1000 * statistics.median(column) for column in zip(*times[1:], strict=True))
        rows.append([name, f"{prefill:.1f}", f"{decode / (NEW - 1):.2f}"])
    print(table(["", "prefill, ms", "decode, ms a token"], rows))
    costs = calibrate(model.base, model.twig, repeats=options.repeats)
    passes = {part: [f"{1000 * getattr(costs, part)[nodes]:.2f}" for nodes in NODES] for part in ("draft", "verify")}
    print(table(["pass over n tokens, ms", *map(str, NODES)], [[part, *times] for part, times in passes.items()]))
    print(json.dumps({"options": asdict(options), "runs": runs}))


if __name__ == "__main__":
    main(tyro.cli(Options))
