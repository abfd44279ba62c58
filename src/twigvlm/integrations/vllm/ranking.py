"""The ranking of scout mode inside vLLM: trunk and twig in plain torch on one prompt, once for each picture and question.

It runs together with the vision tower, outside the paged cache, and vLLM caches its result with the picture's embeddings.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from twigvlm.base.layers import project_keys, run
from twigvlm.base.masks import CausalMasks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.pruning.methods.pruning_head import VisualQuery, log_visual_attention
from twigvlm.pruning.methods.twig_attention import layer_scores
from twigvlm.pruning.select import Select, best
from twigvlm.pruning.view import Tokens
from twigvlm.twig.pruning_head import PruningHead

_UNUSED = ("mlp", "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj")
"""Modules that the last layer does not need, since only its queries and keys rank; more than 300 MB of a 7B base in half
precision."""


class Ranking(nn.Module):
    """Trunk and twig of an export, as transformers' decoder layers; of the last layer only the parts that rank.

    Args:
        folder: directory of the export.
        dtype: data type of the layers.
        device: device of the layers.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        exported = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.trunk_layers: int = exported["twigvlm"]["trunk_layers"]
        kind, config = _kind_of(exported)
        weights = load_file(Path(folder) / "model.safetensors")
        with torch.device("meta"):
            self.layers = nn.ModuleList(kind(config, index) for index in range(config.num_hidden_layers))
            for name in _UNUSED:
                self.layers[-1].set_submodule(name, nn.Identity())
            head = PruningHead(config.hidden_size, config.num_attention_heads * exported["head_dim"])
        self.pruning_head = head if any(name.startswith("pruning_head.") for name in weights) else None
        self.to(dtype).to_empty(device=device)
        unused = tuple(f"layers.{len(self.layers) - 1}.{name}." for name in _UNUSED)
        ranking = {
            name: tensor
            for name, tensor in weights.items()
            if name.startswith(("layers.", "pruning_head.")) and not name.startswith(unused)
        }
        self.load_state_dict(ranking)
        self.requires_grad_(False)
        rotary = Qwen2VLRotaryEmbedding if "mrope_section" in config.rope_parameters else LlamaRotaryEmbedding
        self.rotary = rotary(config).to(device)
        grouped = config.num_key_value_heads < config.num_attention_heads
        half_on_cpu = device.type == "cpu" and dtype != torch.float32
        self.masks = CausalMasks("sdpa", dtype, device, grouped and half_on_cpu)

    @torch.no_grad()
    def forward(
        self, embeddings: Tensor, visual: Tensor, positions: Tensor, keep: int, select: Select = best
    ) -> Tensor:
        """Indices, among a prompt's visual tokens, of those that are kept, ascending, [keep].

        Args:
            embeddings: embeddings of the prompt, the picture's included, [tokens, width].
            visual: True at visual tokens, [tokens]; the last token must not be one.
            positions: positions of the tokens, [1, tokens], or [3, tokens] with M-RoPE.
            keep: R.
            select: chooses the kept tokens by their scores.
        """
        hidden, mask = embeddings[None], visual[None]
        inputs = TokenInputs(*self.rotary(hidden, positions[:, None] if len(positions) == 3 else positions))
        states = run(self.layers[: self.trunk_layers], hidden, inputs, self.masks)
        hidden = run(self.layers[self.trunk_layers : -1], states, inputs, self.masks)
        last: Any = self.layers[-1]
        if self.pruning_head is None:
            keys = project_keys(last, hidden, inputs)
            tokens = Tokens(hidden, inputs, mask, (hidden.shape[1],))
            scores = layer_scores(last, hidden, keys, tokens, "last")
        else:
            asking = torch.zeros_like(mask)
            asking[:, -1] = True
            query = VisualQuery.at(asking, mask)
            shares = log_visual_attention(last, hidden, inputs, query, self.pruning_head)[:, 0].exp()
            scores = shares.new_zeros(mask.shape).scatter(1, query.visual, shares)
        return select(scores, states, mask, [keep])[0, visual].nonzero()[:, 0]


def _kind_of(exported: dict[str, Any]) -> tuple[type[nn.Module], Any]:
    names = set(exported) - {"model_type", "architectures", "twigvlm", "eagle_config", "dtype"}
    values = {name: exported[name] for name in names} | {"attn_implementation": "sdpa"}
    if exported["twigvlm"]["layer"] == "qwen3":
        return Qwen3DecoderLayer, Qwen3Config(**values)
    if exported["qkv_bias"] and not exported["attention_bias"]:
        return Qwen2DecoderLayer, Qwen2Config(**values)
    return LlamaDecoderLayer, LlamaConfig(**values)
