"""The twig: T decoder layers on the output of base layer K, a norm, a head that drafts tokens (§3.1), maybe a P-Head."""

import copy
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twigvlm.base.cache import LayeredCache
from twigvlm.base.layers import fill, run
from twigvlm.base.masks import Masks
from twigvlm.base.positions import Rope
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.twig.pruning_head import PruningHead


class Twig(nn.Module):
    """T decoder layers, a final norm, a drafting head, and a P-Head if the config says so.

    All parameters are trainable; nothing of the base is inside.

    Args:
        base: the base it grows on; its layers, norm and head are copied, never changed.
        config: shape and initialisation.
        draft_token_ids: ids of the tokens it can draft (at most those of the base's head, each once); None: all.

    Raises:
        TwigVLMError: the base has too few layers, or the ids are out of range or of another number than the config's.
    """

    draft_token_ids: Tensor | None
    head_rows: Tensor | None
    head_bias: Tensor | None

    def __init__(
        self, base: BaseVLM, config: TwigConfig, draft_token_ids: Int[Tensor, " draft_vocabulary"] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.first_slot = base.num_layers
        # The copies keep the base's config object, so that they follow it to another attention implementation.
        self.layers = nn.ModuleList(
            copy.deepcopy(layer, {id(base.config): base.config}) for layer in _sources(base, config)
        )
        for slot, layer in enumerate(self.layers, start=self.first_slot):
            cast(Any, layer).self_attn.layer_idx = slot
            if hasattr(layer, "layer_idx"):
                cast(Any, layer).layer_idx = slot
        self.norm = copy.deepcopy(base.norm)
        vocabulary = base.head.weight.shape[0]
        ids = _checked_ids(config, draft_token_ids, vocabulary)
        self.register_buffer("draft_token_ids", None if ids is None else ids.to(base.head.weight.device))
        self._make_head(base)
        if config.init == "random":
            self._randomise(float(getattr(base.config, "initializer_range", 0.02)))
        self.pruning_head: PruningHead | None = None
        if config.pruning_head:
            gates = base.config.num_attention_heads * cast(Any, self.layers[-1]).self_attn.head_dim
            self.pruning_head = PruningHead(base.config.hidden_size, gates).to(self.norm.weight)
        self.requires_grad_(True)

    def _make_head(self, base: BaseVLM) -> None:
        source = cast(nn.Linear, base.head)
        rows, bias = source.weight.detach(), None if source.bias is None else source.bias.detach()
        if self.draft_token_ids is not None:
            rows = rows[self.draft_token_ids]
            bias = None if bias is None else bias[self.draft_token_ids]
        self.head: nn.Linear | None = None
        # A base's head that is used whole stays the base's: no copy, no place in the twig's state.
        object.__setattr__(self, "base_head", source)
        own_rows = self.config.head == "shared" and self.draft_token_ids is not None
        self.register_buffer("head_rows", rows.clone() if own_rows else None, persistent=False)
        self.register_buffer("head_bias", bias.clone() if own_rows and bias is not None else None, persistent=False)
        if self.config.head == "own":
            self.head = nn.Linear(rows.shape[1], rows.shape[0], bias=bias is not None, device="meta")
            self.head.weight = nn.Parameter(rows.clone())
            if bias is not None:
                self.head.bias = nn.Parameter(bias.clone())

    def _randomise(self, std: float) -> None:
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        neutral = type(self.norm)(1).weight.item()  # 1, or 0 in families whose norms scale by 1 + weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 and name.endswith("norm.weight"):
                nn.init.constant_(parameter, neutral)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=std)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        rope: Rope,
        masks: Masks,
        cache: LayeredCache | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Run the twig on states after base layer K; the result goes to `logits`."""
        return run(self.layers, hidden, rope, masks, cache, self.first_slot)

    def checkpoint_gradients(self, on: bool) -> None:
        """In training, keep of each layer its input alone, and run it again for its gradients."""
        for layer in self.layers:
            cast(Any, layer).gradient_checkpointing = on
            cast(Any, layer)._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    @torch.no_grad()
    def open_gates(self, base: BaseVLM, tokens: int = 256) -> None:
        """Open the P-Head's gates to tokens like the base's own, seen in random text; without a P-Head nothing happens."""
        if self.pruning_head is None:
            return
        prompt = base.text_prompt(tokens)
        rope, masks = base.rope(prompt), base.masks(prompt)
        hidden = base.run_layers(prompt.hidden, 0, self.config.trunk_layers, rope, masks)
        hidden = self.last_input(hidden, rope, masks)
        self.pruning_head.open(cast(Any, self.layers[-1]).input_layernorm(hidden)[0])

    def last_input(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        rope: Rope,
        masks: Masks,
        cache: LayeredCache | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Run all twig layers but the last, which visual tokens are ranked by."""
        return run(self.layers[:-1], hidden, rope, masks, cache, self.first_slot)

    def last(
        self, hidden: Float[Tensor, "batch tokens width"], rope: Rope, masks: Masks
    ) -> Float[Tensor, "batch tokens width"]:
        """Run the last twig layer on its input; the result goes to `logits`."""
        return run(self.layers[-1:], hidden, rope, masks, slot=self.last_slot)

    def fill(
        self, hidden: Float[Tensor, "batch tokens width"], rope: Rope, masks: Masks, cache: LayeredCache
    ) -> Float[Tensor, "batch tokens width"]:
        """Put a prompt into the cache and return the *input* of the last twig layer.

        That layer's output at prompt tokens is never used, so only its keys and values are computed: its queries,
        attention and MLP are saved.
        """
        hidden = self.last_input(hidden, rope, masks, cache)
        fill(self.layers[-1], hidden, rope, cache, self.last_slot)
        return hidden

    @property
    def last_slot(self) -> int:
        """Cache slot of the last twig layer."""
        return self.first_slot + len(self.layers) - 1

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions draft_vocabulary"]:
        """Norm and head, over the tokens that the twig can draft."""
        normed = self.norm(hidden)
        if self.head is not None:
            return cast(Tensor, self.head(normed))
        if self.head_rows is not None:
            return F.linear(normed, self.head_rows, self.head_bias)
        return cast(Tensor, cast(Any, self).base_head(normed))


def _sources(base: BaseVLM, config: TwigConfig) -> list[nn.Module]:
    trunk, twig, total = config.trunk_layers, config.twig_layers, base.num_layers
    if trunk + twig > total:
        raise TwigVLMError(
            f"trunk_layers={trunk} and twig_layers={twig}: together at most {total}, the layers of this base"
        )
    if config.final_wipe is not None and config.final_wipe > total:
        raise TwigVLMError(f"final_wipe={config.final_wipe}: at most {total}, the layers of this base")
    start = total - twig if config.init == "last" else trunk
    return base.layers[start : start + twig]


def _checked_ids(config: TwigConfig, ids: Tensor | None, vocabulary: int) -> Tensor | None:
    if config.draft_vocabulary is None and ids is None:
        return None
    if ids is None or len(ids) != config.draft_vocabulary:
        given = "none" if ids is None else len(ids)
        raise TwigVLMError(f"draft_vocabulary={config.draft_vocabulary}: needs as many draft_token_ids, got {given}")
    ids = ids.detach().to(torch.long).clone()
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary or len(ids.unique()) != len(ids):
        raise TwigVLMError(f"draft_token_ids: must be distinct ids from 0 to {vocabulary - 1}")
    return ids
