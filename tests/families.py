"""A tiny random model of every family, built in process; a family is one entry of `TINY`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

IMAGE, VIDEO, VOCABULARY, LAYERS, TRUNK, TWIG = 99, 98, 100, 6, 2, 2
PLACEHOLDERS = {"image": IMAGE, "video": VIDEO}

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Tiny:
    """A family's entry: how to build its model, and the pixels of its images and videos."""

    model: Callable[[str], Any]
    """Attention implementation -> the model, whatever its weights."""
    pixels: Callable[[str, torch.Generator], dict[str, torch.Tensor]]
    """("image" or "video", generator) -> what the processor would return of two images, or of one video."""
    token_types: str | None = None
    """Name of the input that tells text (0), images (1) and videos (2) apart, where the family has one."""
    videos: bool = False
    groups: int = 1
    """Runs of placeholders that one video is split into."""


def _vlm(family: str, tower: str, text: str, /, **options: Any) -> Callable[[str], Any]:
    """Attention implementation -> a model, from the names of its classes in transformers."""

    def build(attention: str) -> Any:
        own = {name: options[name] for name in options if name not in ("tower", "text")}
        config = getattr(hf, f"{family}Config")(
            vision_config=getattr(hf, f"{tower}Config")(**options.get("tower", TOWER)),
            text_config=getattr(hf, f"{text}Config")(**{**TEXT, **options.get("text", {})}),
            image_token_id=IMAGE,
            attn_implementation=attention,
            **own,
        )
        return getattr(hf, f"{family}ForConditionalGeneration")(config)

    return build


def _squares(kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if kind == "video":
        return {"pixel_values_videos": torch.randn(1, 4, 3, 16, 16, generator=generator)}
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def _video_llava(kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Video-LLaVA's images, whose input older versions of transformers know by another name only."""
    (name, pixels), *_ = _squares(kind, generator).items()
    known = inspect.signature(hf.VideoLlavaForConditionalGeneration.forward).parameters
    return {name if name in known else "pixel_values_images": pixels}


def _tiles(kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if kind == "video":
        return _squares(kind, generator)
    pixels = torch.randn(2, 3, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[10, 30], [30, 12]])}


def _sized(kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_squares(kind, generator), "image_sizes": torch.tensor([[16, 8], [8, 16]])}


def _nested(kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 2, 3, 16, 16, generator=generator)}


def _grids(kind: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if kind == "video":
        pixels = torch.randn(48, 96, generator=generator)
        return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[3, 4, 4]])}
    pixels = torch.randn(24 + 32, 96, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 4]])}


PINPOINTS = [[16, 32], [32, 16]]
PIXTRAL = {**TOWER, "head_dim": 16}
# Patches of 4x4 pixels in two frames, merged two by two.
QWEN = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
INTERN = {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}}

TINY: dict[str, Tiny] = {
    "llava": Tiny(_vlm("Llava", "CLIPVision", "Llama"), _squares),
    "pixtral": Tiny(
        _vlm(
            "Llava",
            "PixtralVision",
            "Mistral",
            tower=PIXTRAL,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        _sized,
    ),
    "llava_next": Tiny(
        _vlm("LlavaNext", "CLIPVision", "Mistral", text={"sliding_window": 24}, image_grid_pinpoints=PINPOINTS), _tiles
    ),
    "llava_next_video": Tiny(
        _vlm("LlavaNextVideo", "CLIPVision", "Llama", image_grid_pinpoints=PINPOINTS, video_token_id=VIDEO),
        _tiles,
        videos=True,
    ),
    "llava_onevision": Tiny(
        _vlm(
            "LlavaOnevision",
            "SiglipVision",
            "Qwen2",
            tower={**TOWER, "vision_use_head": False},
            image_grid_pinpoints=PINPOINTS,
            video_token_id=VIDEO,
        ),
        _tiles,
        videos=True,
    ),
    "video_llava": Tiny(_vlm("VideoLlava", "CLIPVision", "Llama", video_token_id=VIDEO), _video_llava, videos=True),
    "mistral3": Tiny(
        _vlm("Mistral3", "PixtralVision", "Mistral", tower=PIXTRAL, text={"sliding_window": None}), _sized
    ),
    "idefics3": Tiny(_vlm("Idefics3", "Idefics3Vision", "Llama", scale_factor=2), _nested),
    "smolvlm": Tiny(_vlm("SmolVLM", "SmolVLMVision", "Llama", scale_factor=2), _nested),
    "internvl": Tiny(_vlm("InternVL", "InternVLVision", "Qwen2", tower=INTERN), _squares),
    "internvl3_5": Tiny(_vlm("InternVL", "InternVLVision", "Qwen3", tower=INTERN, text={"head_dim": 8}), _squares),
    "qwen2_vl": Tiny(
        _vlm(
            "Qwen2VL",
            "Qwen2VLVision",
            "Qwen2VLText",
            tower={**QWEN, "embed_dim": 32},
            text={**MROPE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
            video_token_id=VIDEO,
        ),
        _grids,
        token_types="mm_token_type_ids",
        videos=True,
    ),
    "qwen2_5_vl": Tiny(
        _vlm(
            "Qwen2_5_VL",
            "Qwen2_5_VLVision",
            "Qwen2_5_VLText",
            tower={
                **QWEN,
                "intermediate_size": 48,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            text=MROPE,
            video_token_id=VIDEO,
        ),
        _grids,
        token_types="mm_token_type_ids",
        videos=True,
    ),
    "qwen3_vl": Tiny(
        _vlm(
            "Qwen3VL",
            "Qwen3VLVision",
            "Qwen3VLText",
            tower={
                **QWEN,
                "depth": 3,
                "intermediate_size": 48,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1, 2],  # the last one enters beyond the trunk
            },
            text={**MROPE, "head_dim": 8},
            video_token_id=VIDEO,
        ),
        _grids,
        token_types="mm_token_type_ids",
        videos=True,
        groups=3,
    ),
    "gemma3": Tiny(
        _vlm(
            "Gemma3",
            "SiglipVision",
            "Gemma3Text",
            tower={**TOWER, "vision_use_head": False},
            text={
                "head_dim": 8,
                "sliding_window": 9,
                "query_pre_attn_scalar": 12,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
            mm_tokens_per_image=16,
        ),
        _squares,
        token_types="token_type_ids",
    ),
}


def tiny(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A family's tiny model, its weights scaled so that outputs vary and a twig is often right.

    Layers beyond trunk and twig contribute little; those the twig is copied from contribute in full.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TINY[name].model(attention).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    scale = 1.0 if "embed" in parameter_name else 1.5 * parameter[0].numel() ** -0.5
                    parameter.copy_(scale * torch.randn_like(parameter))
            embedding = model.get_input_embeddings()
            embedding.weight.div_(2 * getattr(embedding, "embed_scale", 0.5))
            for layer in _decoder(model).layers[TRUNK + TWIG :]:
                if hasattr(layer, "pre_feedforward_layernorm"):  # norms after the sublayers, of scale 1 + weight
                    layer.post_attention_layernorm.weight.fill_(-0.9)
                    layer.post_feedforward_layernorm.weight.fill_(-0.9)
                layer.self_attn.o_proj.weight.mul_(0.1)
                layer.mlp.down_proj.weight.mul_(0.1)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def _decoder(model: Any) -> Any:
    return getattr(model.model, "text_model", None) or model.model.language_model


def prompts(name: str) -> list[str]:
    """What a family's prompts may hold: `images` (two, apart), `video` (the images, and one), `text`."""
    return ["images", *(["video"] if TINY[name].videos else []), "text"]


@torch.no_grad()
def prompt(model: Any, name: str, kind: str, seed: int = 0) -> dict[str, Any]:
    """Inputs as a processor would return them, with as many placeholders as the model makes features."""
    entry, generator = TINY[name], torch.Generator().manual_seed(seed)
    pixels, counts = {}, []
    for medium in {"images": ["image"], "video": ["image", "video"], "text": []}[kind]:
        given = entry.pixels(medium, generator)
        pixels.update(given)
        # The pixels come first, by position: some versions of transformers name that parameter differently.
        (_, first), *others = given.items()
        features = getattr(model.model, f"get_{medium}_features")(first, **dict(others), return_dict=True).pooler_output
        sizes = [part.numel() // TEXT["hidden_size"] for part in features]
        runs = {"image": 2, "video": entry.groups}[medium]
        even = [sum(sizes) // runs] * runs
        counts += [(medium, n) for n in (even if runs != len(features) else sizes)]

    def text(count: int) -> torch.Tensor:
        return torch.randint(2, VIDEO, (1, count), generator=generator)

    parts = [text(3)]
    for medium, count in counts:
        parts += [torch.full((1, count), PLACEHOLDERS[medium]), text(4)]
    ids = torch.cat(parts, dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if entry.token_types is not None:
        inputs[entry.token_types] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return inputs
