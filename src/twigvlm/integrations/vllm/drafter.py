"""A twig as a drafter of vLLM (its method eagle3): trunk and twig as one stack of plain decoder layers.

Only vLLM imports this module, in its worker processes. Tested with the versions in `twigvlm.integrations.vllm.TESTED`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsMultiModalEmbeddings
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    _merge_multimodal_embeddings,
    get_draft_quant_config,
    maybe_prefix,
)
from vllm.platforms import current_platform

from twigvlm.integrations.vllm.arithmetic import (
    following_indices,
    following_positions,
    moved_by,
    position_buffer,
    split_deepstack,
    take_indices,
    without_offsets,
)
from twigvlm.integrations.vllm.layout import check_attention, check_runner, check_target

_log = init_logger(__name__)


class _LlamaLayer(LlamaDecoderLayer):
    """Llama's decoder layer or, with biases on queries, keys and values, Qwen2's, with the draft's own quantisation."""

    def get_quant_config(self, vllm_config: VllmConfig) -> Any:
        """None: an exported twig is not quantised, even where the target is."""
        return get_draft_quant_config(vllm_config)


@support_torch_compile(dynamic_arg_dims={"embeddings": 0, "positions": -1, "deepstack": 0})
class TwigLayers(nn.Module):
    """The trunk's layers 1..K, and the twig's T layers and norm."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, first_layer: int = 0, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.config = config
        self.trunk_layers = config.twigvlm["trunk_layers"]
        # Both runners put the target's embedding here; a copy of its own would be made for nothing.
        self.embed_tokens = nn.Embedding(1, config.hidden_size)
        quantisation = get_draft_quant_config(vllm_config)

        def layer(index: int) -> nn.Module:
            # Layers of one engine are told apart by their numbers: the drafter's follow the target's.
            name = maybe_prefix(prefix, f"layers.{first_layer + index}")
            if config.twigvlm["layer"] == "qwen3":
                return Qwen3DecoderLayer(config, vllm_config.cache_config, quantisation, name)
            return _LlamaLayer(vllm_config, name, config)

        self.layers = nn.ModuleList(layer(index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embeddings: Tensor, positions: Tensor, deepstack: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states [tokens, width] after the norm, for the head, and before it.

        Args:
            embeddings: embeddings of the tokens, images included, [tokens, width].
            positions: positions, [tokens], or [3, tokens] with M-RoPE.
            deepstack: features to add after the trunk's first layers, [tokens, width × levels]; None: none.
        """
        hidden, residual, width = embeddings, None, embeddings.shape[-1]
        levels = 0 if deepstack is None else min(deepstack.shape[-1] // width, self.trunk_layers)
        for index, layer in enumerate(self.layers):
            hidden, residual = layer(positions, hidden, residual)
            if deepstack is not None and index < levels:
                hidden = hidden + deepstack[:, index * width : (index + 1) * width]
        normed, before = self.norm(hidden, residual)
        return normed, before


class TwigDrafter(Eagle3LlamaForCausalLM, SupportsMultiModalEmbeddings):
    """Drafts as the twig does. vLLM's proposers require a subclass of its Eagle-3 class, of which only `compute_logits` is used:
    it maps the draft vocabulary to the target's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.speculative_config.draft_model_config.hf_config
        check_target(config.twigvlm, vllm_config.model_config.hf_text_config, vllm_config.parallel_config)
        self._target_mrope = vllm_config.model_config.uses_mrope
        if self._target_mrope:
            check_runner(vllm_config.use_v2_model_runner)
        if current_platform.is_cpu():
            _log.warning(
                "twigvlm: vLLM 0.32 samples wrongly on a CPU with any drafter; ask with temperature 0, or serve without one"
            )
        self.config = config
        first = vllm_config.model_config.get_total_num_hidden_layers()
        config.target_layer_count = first
        self.model = TwigLayers(vllm_config=vllm_config, first_layer=first, prefix=maybe_prefix(prefix, "model"))
        self.has_own_embed_tokens = False
        self.has_own_lm_head = bool(config.twigvlm["head"])
        self.lm_head: nn.Module = nn.Identity()  # the target's takes its place
        if self.has_own_lm_head:
            name = maybe_prefix(prefix, "lm_head")
            quantisation = get_draft_quant_config(vllm_config)
            self.lm_head = ParallelLMHead(
                config.draft_vocab_size, config.hidden_size, quant_config=quantisation, prefix=name
            )
        self.logits_processor = LogitsProcessor(config.draft_vocab_size)
        # A draft vocabulary may be as large as the target's and still be in another order. Older exports do not say whether.
        maps = config.twigvlm.get("maps", config.draft_vocab_size != config.vocab_size)
        ids = nn.Parameter(torch.zeros(config.draft_vocab_size, dtype=torch.long), requires_grad=False)
        self.draft_id_to_target_id = ids if maps else None
        self.use_parallel_drafting = False
        levels = config.twigvlm["deepstack_levels"]
        if self._target_mrope:
            check_attention(self._first_attention.attn_backend.get_name())
        self._columns = config.hidden_size * (1 + levels)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # At one address for as long as the model lives, because CUDA graphs read it there.
        self.deepstack = torch.zeros(tokens, config.hidden_size * levels) if levels else None
        # In scout mode how far each visual token is from its picture's first position, on three axes or one.
        self.offsets = torch.zeros(3, tokens, dtype=torch.long)
        self.positions = position_buffer(tokens)
        self._begins = False
        self._gaps = self.offsets[:, :0]
        self._embeddings: Tensor | None = None

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embeddings [tokens, width] of text and images; `forward` adds Qwen3-VL's deepstack features."""
        tokens, width = input_ids.shape[0], self.config.hidden_size
        self.offsets.zero_()
        if self.deepstack is not None:
            self.deepstack[:tokens].zero_()
        if not multimodal_embeddings or is_multimodal is None:
            return self.model.embed_tokens(input_ids)
        is_multimodal = is_multimodal.to(input_ids.device)
        embedded = self.model.embed_tokens(input_ids.masked_fill(is_multimodal, 0))
        placed = [without_offsets(features, self._columns) for features in multimodal_embeddings]
        offsets = torch.cat([offset for _, offset in placed])
        if offsets.shape[1]:
            self.offsets[:, :tokens][:, is_multimodal] = offsets.T
        parts = [split_deepstack(features, width) for features, _ in placed]
        if self.deepstack is not None and parts[0][1] is not None:
            beside = [part for _, part in parts if part is not None]
            _merge_multimodal_embeddings(self.deepstack[:tokens], beside, is_multimodal)
        return _merge_multimodal_embeddings(embedded, [part for part, _ in parts], is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the slots, [slots, width], after and before the norm. The target's `hidden_states` are not used."""
        if inputs_embeds is None:
            assert input_ids is not None, "a pass has ids or embeddings"
            inputs_embeds = self._at_one_address(self.embed_input_ids(input_ids))
        if self._target_mrope:
            last = self.config.max_position_embeddings - 1  # as in scout.py, and why
            positions = moved_by(self._following(positions), self.offsets, last, self.positions)
        deepstack = None if self.deepstack is None else self.deepstack[: inputs_embeds.shape[0]]
        return self.model(inputs_embeds, positions, deepstack)

    @property
    def _first_attention(self) -> Any:
        first: Any = self.model.layers[0]
        return first.self_attn.attn

    def _at_one_address(self, embeddings: Tensor) -> Tensor:
        """Copy embeddings to the address that CUDA graphs read; needed in an engine without images, whose runner passes ids."""
        if self._embeddings is None:
            self._embeddings = embeddings.new_zeros(self.offsets.shape[1], embeddings.shape[1])
        return self._embeddings[: len(embeddings)].copy_(embeddings)

    def _following(self, positions: Tensor) -> Tensor:
        """Positions of the slots' tokens if the target's have three axes; vLLM's own buffer gets the slots' indices."""
        metadata = get_forward_context().attn_metadata
        of_layer = metadata.get(self._first_attention.layer_name) if isinstance(metadata, dict) else None
        if of_layer is None:  # a pass without a cache, before vLLM serves
            return positions + 1
        if not self._begins:
            return following_indices(positions, self._gaps)
        self._begins = False
        following = following_positions(positions, of_layer.query_start_loc)
        self._gaps = take_indices(positions, of_layer.seq_lens, of_layer.query_start_loc)
        return following

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """Return the states unchanged: runners copy them, and `forward` does not use them. The first runner calls this once for
        each draft, before its first pass."""
        self._begins = True
        return hidden_states

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the weights of an export.

        Raises:
            ValueError: a weight of the drafter is missing.
        """

        def named() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name == "d2t":
                    yield "draft_id_to_target_id", tensor
                elif not name.startswith("pruning_head."):  # which scout mode loads
                    yield (name if name.startswith("lm_head.") else f"model.{name}"), tensor

        loaded = AutoWeightsLoader(self).load_weights(named(), mapper=TwigLayers.hf_to_vllm_mapper)
        expected = {name for name, _ in self.named_parameters()} - {"model.embed_tokens.weight"}
        if missing := sorted(expected - loaded):
            raise ValueError(f"twigvlm: the export has no {', '.join(missing[:3])}; export the twig again")
