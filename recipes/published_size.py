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
from twigvlm.decoding.costs import NODES, calibrate
from twigvlm.evaluation.report import table
from twigvlm.evaluation.speed import Contender, in_turn, measure
from twigvlm.model import TwigVLM

BUDGETS = (192.0, 128.0, 64.0)


@dataclass(frozen=True)
class Options:
    device: str = "cuda"
    layers: int = 32
    width: int = 4096
    """Of the language model; heads of 128, as LLaMA's."""
    text: int = 60
    """Tokens of text, behind 576 of a picture."""
    new_tokens: int = 64
    repeats: int = 5
    """Runs of each contender, alternating; the median counts. One more warms up."""


def build(options: Options) -> TwigVLM:
    """LLaVA-1.5 with a twig of the published shape, all weights random."""
    text = LlamaConfig(
        vocab_size=32064,
        num_hidden_layers=options.layers,
        hidden_size=options.width,
        intermediate_size=options.width * 43 // 16,
        num_attention_heads=options.width // 128,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)
        ).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return TwigVLM.grow(model, TwigConfig(final_wipe=options.layers * 3 // 4, pruning_head=True))


def main(options: Options) -> None:
    model = build(options)
    ids = torch.randint(3, 32000, (1, options.text))
    ids = torch.cat((ids[:, :1], torch.full((1, 576), 32000), ids[:, 1:]), dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 336, 336)}
    inputs = {name: value.to(options.device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    contenders = [Contender("HF generate, sdpa", "sdpa"), Contender("own loop")]
    contenders += [Contender(f"pruning, R̄ = {budget:g}", options={"retain": budget}) for budget in BUDGETS]
    runs: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    for turn in range(options.repeats + 1):
        for contender in in_turn(contenders, turn):
            one = measure(model, inputs, contender, options.new_tokens)
            runs[contender.name].append((one.prefill, one.total - one.prefill))
    rows = []
    for name, times in runs.items():
        prefill, decode = (1000 * statistics.median(column) for column in zip(*times[1:], strict=True))
        rows.append([name, f"{prefill:.1f}", f"{decode / (options.new_tokens - 1):.2f}"])
    print(table(["", "prefill, ms", "decode, ms a token"], rows))
    costs = calibrate(model.base, model.twig, repeats=options.repeats)
    passes = {part: [f"{1000 * getattr(costs, part)[nodes]:.2f}" for nodes in NODES] for part in ("draft", "verify")}
    print(table(["pass over n tokens, ms", *map(str, NODES)], [[part, *times] for part, times in passes.items()]))
    print(json.dumps({"options": asdict(options), "runs": runs}))


if __name__ == "__main__":
    main(tyro.cli(Options))
