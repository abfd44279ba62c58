"""Export a twig as a drafter checkpoint for vLLM: trunk and twig as one stack of decoder layers, head, draft vocabulary."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from twigvlm.base.layers import window_of
from twigvlm.base.vlm import BaseVLM
from twigvlm.base.weights import bias_of, plain_weights
from twigvlm.checkpoints.twig_files import check_finite
from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing, writing
from twigvlm.integrations.vllm import DRAFTER
from twigvlm.integrations.vllm.layout import DIMENSIONS, FORMAT
from twigvlm.model import TwigVLM

FAMILIES = ("llava", "llava_next", "llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types of the bases whose twigs can be exported."""
LAYERS = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen2_vl_text": "llama",
    "qwen2_5_vl_text": "llama",
    "qwen3_vl_text": "qwen3",
}
"""Model types of decoders -> the model type in vLLM whose layers compute the same."""
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)


def export(model: TwigVLM, path: str | Path) -> Path:
    """Write the drafter of a twig to a directory that vLLM loads. Each file is replaced completely or not at all.

    Args:
        model: the base with its twig.
        path: the directory.

    Raises:
        TwigVLMError: vLLM or the plug-in does not support this base, or the directory cannot be written to.
    """
    check_exportable(model.base)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise TwigVLMError(f"out {str(folder)!r}: is a file; name a directory")
    weights = drafter_weights(model)
    check_finite(weights, f"{folder}: not exported")
    with writing(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(drafter_config(model), indent=2) + "\n", encoding="utf-8")
    return folder


def check_exportable(base: BaseVLM) -> None:
    """Raise TwigVLMError, with the reason, for a base whose twigs the plug-in cannot run."""
    family, decoder = base.family.model_type, base.config.model_type
    if family not in FAMILIES:
        raise TwigVLMError(f"model type {family!r}: cannot be exported to vLLM; choose from {', '.join(FAMILIES)}")
    if decoder not in LAYERS:
        raise TwigVLMError(
            f"decoder {decoder!r}: the plug-in for vLLM has no such layer; choose from {', '.join(LAYERS)}"
        )
    window = min((size for size in map(window_of, base.layers) if size is not None), default=None)
    if window is not None and window < base.config.max_position_embeddings:
        raise TwigVLMError(
            f"sliding window of {window} tokens: the plug-in for vLLM runs layers that see all tokens; choose a base without a "
            "window"
        )
    if base.config.hidden_act != "silu":
        raise TwigVLMError(
            f"activation {base.config.hidden_act!r}: the plug-in's layers have silu; choose a base that has it too"
        )
    if bias_of(base.head) is not None:
        raise TwigVLMError("the base's head has a bias, which vLLM's heads do not have; choose a base without one")


def drafter_config(model: TwigVLM) -> dict[str, Any]:
    """The Hugging Face config of the drafter, with the entries that both of vLLM's model runners read."""
    base, twig = model.base, model.twig
    config: dict[str, Any] = {name: getattr(base.config, name) for name in _COPIED}
    attention: Any = base.layers[0].self_attn
    layer, trunk = LAYERS[base.config.model_type], twig.config.trunk_layers
    biased = attention.q_proj.bias is not None
    vision = getattr(base.model.config, "vision_config", None)
    draftable = base.vocabulary if twig.draft_token_ids is None else len(twig.draft_token_ids)
    config.update(
        architectures=[DRAFTER],
        model_type=layer,
        head_dim=attention.head_dim,
        num_hidden_layers=trunk + len(twig.layers),
        attention_bias=biased if layer == "qwen3" else attention.o_proj.bias is not None,
        qkv_bias=biased,
        mlp_bias=getattr(base.config, "mlp_bias", False),
        tie_word_embeddings=False,
        dtype=str(base.dtype).removeprefix("torch."),
        draft_vocab_size=draftable,
        # vLLM's first runner asks for no states of the target then; its second one always asks for those of some layers, and
        # must get states of one layer, or their width is not the drafter's.
        eagle_config={"use_aux_hidden_state": False},
        eagle_aux_hidden_state_layer_ids=[trunk],
    )
    config["twigvlm"] = {
        "format": FORMAT,
        "layer": layer,
        "trunk_layers": trunk,
        "twig_layers": len(twig.layers),
        "head": twig.head is not None or twig.draft_token_ids is not None,
        "maps": twig.draft_token_ids is not None,
        "deepstack_levels": len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        "base": {name: getattr(base.config, name) for name in DIMENSIONS},
    }
    return config


@torch.no_grad()
def drafter_weights(model: TwigVLM) -> dict[str, Tensor]:
    """The weights by name: `layers.0` … `layers.K+T-1`, `norm`, `lm_head` unless it is the base's, and `d2t`, which maps a draft
    id to the difference between its token id and itself."""
    base, twig = model.base, model.twig
    layers = [*base.layers[: twig.config.trunk_layers], *twig.layers]
    parts: dict[str, Any] = {f"layers.{index}": layer for index, layer in enumerate(layers)} | {"norm": twig.norm}
    if twig.head is not None:
        parts["lm_head"] = twig.head
    if twig.pruning_head is not None:
        parts["pruning_head"] = twig.pruning_head
    weights = {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in plain_weights(module, base.dtype, torch.device("cpu")).items()
    }
    if twig.head is None and twig.head_rows is not None:
        weights["lm_head.weight"] = twig.head_rows.cpu()
    if twig.draft_token_ids is not None:
        ids = twig.draft_token_ids.cpu()
        weights["d2t"] = ids - torch.arange(len(ids))
    return {name: tensor.clone().contiguous() for name, tensor in weights.items()}
