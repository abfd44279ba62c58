"""Tiny random models, built in process. Their weights are scaled so that outputs vary and attention is peaked."""

from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

VISUAL = 16
IMAGE_TOKEN = 99
VOCABULARY = 100


def tiny_text(**options: Any) -> LlamaConfig:
    """A language model of two small layers, with grouped-query attention."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **options})


def tiny_llava(
    seed: int = 0,
    layers: int = 6,
    attention: str = "sdpa",
    deep_scale: float = 1.0,
    from_layer: int = 0,
    context: int = 128,
    side: int = 4,
) -> LlavaForConditionalGeneration:
    """A random LLaVA of `side` x `side` visual tokens; layers from `from_layer` on contribute `deep_scale` times as much.

    With a small `deep_scale` a twig copied from the base agrees with it often, so that long drafts are accepted.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=4 * side,
            patch_size=4,
        ),
        text_config=tiny_text(
            num_hidden_layers=layers,
            max_position_embeddings=context,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=side * side,
        attn_implementation=attention,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(center + 0.1 * torch.randn(parameter.shape, generator=generator))
                continue
            fan_in = parameter[0].numel()
            scale = 1.0 if "embed" in name else 1.5 * fan_in**-0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for layer in model.model.language_model.layers[from_layer:]:
            layer.self_attn.o_proj.weight.mul_(deep_scale)
            layer.mlp.down_proj.weight.mul_(deep_scale)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(seed: int = 0, before: int = 3, after: int = 6) -> dict[str, Any]:
    """A prompt of one random image between random text tokens, as a processor would return it."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> torch.Tensor:
        return torch.randint(2, IMAGE_TOKEN, (1, count), generator=generator)

    ids = torch.cat((text(before), torch.full((1, VISUAL), IMAGE_TOKEN), text(after)), dim=1)
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
