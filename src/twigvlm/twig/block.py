"""The twig: T decoder layers on the output of base layer K, a norm, a head that drafts tokens (§3.1), maybe a P-Head."""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twigvlm import compat
from twigvlm.base.cpu_linear import cpu_linear, linear
from twigvlm.base.layers import fill, run
from twigvlm.base.masks import Masks
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.base.vlm import BaseVLM
from twigvlm.base.weights import bias_of, plain_weights
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import CacheView
from twigvlm.twig.pruning_head import PruningHead


class Twig(nn.Module):
    """T decoder layers, a final norm, a drafting head, and a P-Head if the config says so (§3.1).

    All parameters are trainable, and none of them belongs to the base.

    Args:
        base: the base it grows on; its layers, norm and head are copied, never changed. The twig has its dtype, and lives on the
            device on which prompts enter its layers.
        config: shape and initialisation.
        draft_token_ids: ids of the tokens it can draft (at most those of the base's head, each once); None: all.
        fresh: whether the parameters get values; False: `load_state_dict` will give them.

    Raises:
        TwigVLMError: the base has too few layers, the ids are out of range or of another number than the config's, or the
            base is quantised so that its layers cannot be copied.
    """

    record: list[dict[str, Any]]
    """How it was trained: an entry for each stage."""

    is_stand_in: bool
    """Whether there is no twig, and this is where one would be: it neither ranks, drafts nor is saved."""

    draft_token_ids: Tensor | None
    head_rows: Tensor | None
    head_bias: Tensor | None

    @torch.inference_mode(False)  # weights that are made under it can never be trained
    def __init__(
        self,
        base: BaseVLM,
        config: TwigConfig,
        draft_token_ids: Int[Tensor, " draft_vocabulary"] | None = None,
        fresh: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.record = []
        self.is_stand_in = False
        self.first_layer_idx = base.num_layers
        sources = _sources(base, config)
        ids = _checked_ids(config, draft_token_ids, base.vocabulary)
        with torch.device("meta"):
            # They share the base's config object, so that they follow it to another attention implementation.
            layers = [cast(Any, type(compat.uncompiled(base.layers[index]))) for index in sources]
            self.layers = nn.ModuleList(layer(base.config, index) for layer, index in zip(layers, sources, strict=True))
            norm: Any = type(compat.uncompiled(base.norm))
            self.norm = norm(base.config.hidden_size, eps=base.config.rms_norm_eps)
            rows, biased = base.vocabulary if ids is None else len(ids), bias_of(base.head) is not None
            self.head = nn.Linear(base.config.hidden_size, rows, biased) if config.head == "own" else None
        self.to(base.dtype).to_empty(device=base.device)
        for layer_idx, layer in enumerate(self.layers, start=self.first_layer_idx):
            cast(Any, layer).self_attn.layer_idx = layer_idx
            if hasattr(layer, "layer_idx"):
                cast(Any, layer).layer_idx = layer_idx
        self.register_buffer("draft_token_ids", None if ids is None else ids.to(base.device))
        self._keep_head(base, fresh)
        if fresh:
            for layer, index in zip(self.layers, sources, strict=True):
                _copy(base, base.layers[index], layer)
            _copy(base, base.norm, self.norm)
        if fresh and config.init == "random":
            self._randomise(float(getattr(base.config, "initializer_range", 0.02)))
        self.pruning_head: PruningHead | None = None
        if config.pruning_head:
            gates = base.config.num_attention_heads * cast(Any, self.layers[-1]).self_attn.head_dim
            self.pruning_head = PruningHead(base.config.hidden_size, gates).to(self.norm.weight)
        self.requires_grad_(True)

    def _keep_head(self, base: BaseVLM, fresh: bool) -> None:
        """Register the rows of the base's LM head that the twig shares."""
        # A base's head that is used whole stays the base's: no copy, no place in the twig's state.
        object.__setattr__(self, "base_head", base.head)
        shared = self.head is None and self.draft_token_ids is not None
        weights: dict[str, Tensor] = {}
        if shared or (fresh and self.head is not None):
            weights = plain_weights(base.head, base.dtype, base.device)
            if self.draft_token_ids is not None:
                weights = {name: tensor[self.draft_token_ids] for name, tensor in weights.items()}
        if self.head is not None and weights:
            self.head.load_state_dict(weights)
        self.register_buffer("head_rows", weights.get("weight") if shared else None, persistent=False)
        self.register_buffer("head_bias", weights.get("bias") if shared else None, persistent=False)

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
        inputs: TokenInputs,
        masks: Masks,
        view: CacheView | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Run the twig on states after base layer K; the result goes to `logits`.

        Args:
            hidden: the states.
            inputs: inputs of the same tokens.
            masks: masks of the pass.
            view: view of the cache that stores keys and values, and holds earlier ones; None: there is no cache.
        """
        after = run(self.layers, hidden, inputs, masks, view, self.first_layer_idx)
        if view is not None:
            view.advance(*self.cache_layers, hidden.shape[1])
        return after

    def forward_with_last_input(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        inputs: TokenInputs,
        masks: Masks,
        view: CacheView | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens width"]]:
        """The input of the last layer, by which visual tokens are ranked, and what `forward` returns; arguments as there."""
        before_last = self.last_input(hidden, inputs, masks, view)
        after = run(self.layers[-1:], before_last, inputs, masks, view, self.last_layer_idx)
        if view is not None:
            view.advance(*self.cache_layers, hidden.shape[1])
        return before_last, after

    def checkpoint_gradients(self, on: bool) -> None:
        """Choose what training stores of each layer: its input alone, from which its gradients are computed again, or everything.

        Args:
            on: whether it is the input alone.
        """
        for layer in self.layers:
            compat.checkpoint_gradients(layer, on)

    @torch.no_grad()
    def open_gates(self, base: BaseVLM) -> None:
        """Open the P-Head's gates (see `PruningHead.open`), by the states of random text; without a P-Head nothing happens.

        Args:
            base: the base that the twig grew on.
        """
        if self.pruning_head is None:
            return
        prompt = base.text_prompt(256)
        inputs, masks = base.token_inputs(prompt), base.masks()
        hidden = base.run_layers(prompt.hidden, 0, self.config.trunk_layers, inputs, masks)
        hidden = self.last_input(hidden, inputs, masks)
        self.pruning_head.open(cast(Any, self.layers[-1]).input_layernorm(hidden)[0])

    def last_input(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        inputs: TokenInputs,
        masks: Masks,
        view: CacheView | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Run all twig layers but the last, whose input ranks visual tokens; arguments as for `forward`.

        The caller ends the pass with `view.advance`.
        """
        return run(self.layers[:-1], hidden, inputs, masks, view, self.first_layer_idx)

    def fill(
        self, hidden: Float[Tensor, "batch tokens width"], inputs: TokenInputs, masks: Masks, view: CacheView
    ) -> Float[Tensor, "batch tokens width"]:
        """Put a prompt into the cache and return the *input* of the last twig layer; arguments as for `forward`.

        That layer's output at prompt tokens is never used, so that its queries, attention and MLP need not be computed.
        """
        before_last = self.last_input(hidden, inputs, masks, view)
        fill(self.layers[-1], before_last, inputs, view, self.last_layer_idx)
        view.advance(*self.cache_layers, hidden.shape[1])
        return before_last

    @property
    def cache_layers(self) -> tuple[int, int]:
        """(start, stop): the twig writes layers start..stop-1 of the cache."""
        return self.first_layer_idx, self.first_layer_idx + len(self.layers)

    @property
    def last_layer_idx(self) -> int:
        """The layer of the cache that the last twig layer writes."""
        return self.first_layer_idx + len(self.layers) - 1

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions draft_vocabulary"]:
        """Logits of the tokens that the twig can draft, by its norm and head.

        Args:
            hidden: states after the last twig layer.
        """
        normed = self.norm(hidden)
        if self.head is None and self.head_rows is not None:
            return linear(normed, self.head_rows, self.head_bias)
        head: Any = cast(Any, self).base_head if self.head is None else self.head
        with cpu_linear(head, normed):
            return cast(Tensor, head(normed).to(hidden.device))


def _copy(base: BaseVLM, source: nn.Module, target: nn.Module) -> None:
    weights = plain_weights(source, base.dtype, base.device)
    try:
        target.load_state_dict(weights)
    except RuntimeError:
        raise TwigVLMError(
            f"this base's {type(target).__name__} cannot be copied: load the base as transformers makes it, without fused "
            "or replaced modules, to grow a twig; an existing twig loads as it is"
        ) from None


def _sources(base: BaseVLM, config: TwigConfig) -> range:
    """Indices of the base layers that the twig's are copies of."""
    trunk, twig, total = config.trunk_layers, config.twig_layers, base.num_layers
    if trunk + twig > total:
        raise TwigVLMError(
            f"trunk_layers={trunk} and twig_layers={twig}: together at most {total}, the layers of this base"
        )
    if config.final_wipe is not None and config.final_wipe > total:
        raise TwigVLMError(f"final_wipe={config.final_wipe}: at most {total}, the layers of this base")
    start = total - twig if config.init == "last" else trunk
    return range(start, start + twig)


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
