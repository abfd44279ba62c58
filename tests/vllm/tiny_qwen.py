"""Tiny random Qwen-VLs with processors, large enough for vLLM's kernels, and twigs that are often right."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

START, END, IMAGE, VIDEO, PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>"
WORDS = [PAD, START, END, IMAGE, VIDEO, "<unk>", *(f"w{number}" for number in range(122))]
TRUNK, TWIG, LAYERS = 2, 2, 6
TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
    "use_sliding_window": False,
}
TOWER: dict[str, Any] = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 64, "hidden_size": 128},
    "Qwen2_5_VL": {"intermediate_size": 96, "out_hidden_size": 128, "window_size": 112, "fullatt_block_indexes": [1]},
    "Qwen3VL": {
        "depth": 3,
        "intermediate_size": 96,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],  # the last one enters beyond the trunk
    },
}


def build(kind: str) -> Any:
    """A model whose layers beyond trunk and twig contribute little."""
    ids = {name: WORDS.index(token) for name, token in (("image_token_id", IMAGE), ("video_token_id", VIDEO))}
    ids |= {"vision_start_token_id": WORDS.index(START), "vision_end_token_id": WORDS.index(END)}
    text = TEXT
    if kind == "Qwen3VL":
        rope = {**TEXT["rope_parameters"], "mrope_section": [6, 5, 5], "mrope_interleaved": True}
        text = {**TEXT, "head_dim": 32, "rope_parameters": rope}
    config = getattr(hf, f"{kind}Config")(
        vision_config={**TOWER, **TOWERS[kind]}, text_config=text, tie_word_embeddings=False, **ids
    )
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                scale = 1.0 if "embed" in name else 1.5 * parameter[0].numel() ** -0.5
                parameter.copy_(scale * torch.randn_like(parameter))
        model.get_input_embeddings().weight.div_(2)
        for layer in model.model.language_model.layers[TRUNK + TWIG :]:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    model.generation_config = hf.GenerationConfig(pad_token_id=0)
    return model


CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{START} {IMAGE} {END} "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}w7"
)


def processor(kind: str) -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token=PAD,
        additional_special_tokens=[START, END, IMAGE, VIDEO],
    )
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    images = hf.Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 40})
    videos = (hf.Qwen3VLVideoProcessor if kind == "Qwen3VL" else hf.Qwen2VLVideoProcessor)(**sizes)
    name = {"Qwen2VL": "Qwen2VLProcessor", "Qwen2_5_VL": "Qwen2_5_VLProcessor", "Qwen3VL": "Qwen3VLProcessor"}[kind]
    return getattr(hf, name)(image_processor=images, tokenizer=fast, video_processor=videos, chat_template=CHAT)


def write(kind: str, base: Path, drafter: Path) -> Any:
    """Base and export in their directories; the TwigVLM."""
    from twigvlm import TwigConfig, TwigVLM
    from twigvlm.integrations.vllm.bases import save_base
    from twigvlm.integrations.vllm.export import export

    model = TwigVLM.grow(build(kind), TwigConfig(TRUNK, TWIG))
    save_base(model.model, processor(kind), base)
    export(model, drafter)
    return model
