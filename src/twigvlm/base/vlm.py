"""BaseVLM: an unmodified Hugging Face vision-language model, opened at its layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import attrgetter
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from twigvlm import compat
from twigvlm.base.capture import capture, watch
from twigvlm.base.checks import check_model, check_rope, has_mrope
from twigvlm.base.cpu_linear import cpu_linear
from twigvlm.base.families import Visual, family_of, language_model_of
from twigvlm.base.layers import run, window_of
from twigvlm.base.masks import CausalMasks, Masks, TreeMasks, check_attention
from twigvlm.base.placeholders import check_per_token, check_placeholders
from twigvlm.base.prompt import Prompt, attention_ends_of, deepstack_of, packed
from twigvlm.base.token_inputs import TokenInputs
from twigvlm.base.vision import ReadVision, VisionModules
from twigvlm.errors import TwigVLMError, is_refusal, one_line
from twigvlm.kv.cache import CacheView


class BaseVLM:
    """The base's parts by the names that the method uses; layers are counted from 0, ranges exclude their end.

    The base may lie on several devices, and some of it on the disk: accelerate's hooks bring inputs and weights together
    when a module is called. What comes out of the methods here is always on `device`.

    Raises:
        TwigVLMError: the model has adapters, or its family, attention implementation or position embedding is not supported.
    """

    def __init__(self, model: Any) -> None:
        check_model(model)
        self.model = model
        self.family = family_of(model)
        self.decoder: Any = attrgetter(self.family.decoder)(model)
        self.config: Any = self.decoder.config
        self.language_model = language_model_of(self.config)
        self.layers: list[nn.Module] = list(self.decoder.layers)
        self.norm: Any = self.decoder.norm
        self.head: Any = attrgetter(self.family.head)(model)
        self.embed: Any = model.get_input_embeddings()
        self.windowed = any(window_of(layer) is not None for layer in self.layers)
        check_attention(self.attention, self.windowed)
        check_rope(self.config)
        self.context: int | None = getattr(self.config, "max_position_embeddings", None)
        """Number of positions; None: there is no limit."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def attention(self) -> str:
        """The attention implementation of the decoder."""
        return compat.attention_implementation(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the decoder's weights."""
        return next(self.decoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where prompts enter the layers, and where the twig lives."""
        device = compat.execution_device(self.embed)  # on the disk, weights have no device
        return cast(torch.device, self.embed.weight.device) if device is None else device

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.head.out_features)

    def visual_mask(self, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """True where a placeholder stands for a visual token."""
        return reduce(torch.logical_or, [input_ids == token for token, _ in self._visuals()])

    def check_images(self, input_ids: Int[Tensor, "batch tokens"], inputs: dict[str, Any]) -> None:
        """Raise TwigVLMError unless placeholders and pixels come together and, as far as the inputs tell, match.

        A prompt of text alone is fine.

        Args:
            input_ids: prompt ids with placeholders of visual tokens.
            inputs: what else the base's forward takes.
        """
        check_per_token(input_ids, inputs)
        for token, visual in self._visuals():
            check_placeholders(self.model.config, token, visual, input_ids, inputs)

    def least_positions(self, input_ids: Int[Tensor, "batch tokens"], mask: Tensor | None = None) -> int:
        """How many positions the longest prompt needs at least: one for each token, and with M-RoPE for each text token.

        Args:
            input_ids: prompt ids with placeholders of visual tokens.
            mask: 0 at padding, else 1; None: there is none.
        """
        counted = torch.ones_like(input_ids) if mask is None else mask
        if has_mrope(self.config):
            counted = counted * ~self.visual_mask(input_ids)
        return int(counted.sum(dim=1).max())

    def check_positions(self, position_ids: Int[Tensor, "*axes batch tokens"]) -> None:
        """Raise TwigVLMError if a prompt has more positions than the base."""
        axes = position_ids[-3:] if position_ids.ndim == 3 else position_ids  # the first of four is the token's place
        if self.context is not None and int(axes.max()) >= self.context:
            raise TwigVLMError(f"The prompt needs more positions than the {self.context} of the base: shorten it")

    def check_context(self, input_ids: Int[Tensor, "batch tokens"], mask: Tensor | None = None) -> None:
        """Raise TwigVLMError if a prompt is longer than the base's context, as far as the arguments of `least_positions` tell."""
        if self.context is not None and self.least_positions(input_ids, mask) > self.context:
            tokens = input_ids.shape[1] if mask is None else int(mask.sum(dim=1).max())
            raise TwigVLMError(
                f"The prompt has {tokens} tokens, the base's context only {self.context}: shorten the text"
            )

    def pixels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Those arguments of the base's forward that vision runs on."""
        names = {name for visual in self.family.visuals for name in visual.pixels}
        return {name: value for name, value in inputs.items() if name in names}

    def _visuals(self) -> list[tuple[int, Visual]]:
        return [(getattr(self.model.config, visual.placeholder), visual) for visual in self.family.visuals]

    @contextmanager
    def watch_vision(self) -> Iterator[ReadVision]:
        """Keep what this thread's vision tower computes, for prompts that are made within this context.

        The model is not changed: modules that vision passes through have hooks meanwhile.
        """
        modules = VisionModules.of(self.model, self.family.tower)
        with watch(modules.watched) as calls:
            yield lambda hidden, visual_mask: modules.vision(calls, hidden, visual_mask)

    def prompt(self, input_ids: Int[Tensor, "batch tokens"], vision: ReadVision | None = None, **inputs: Any) -> Prompt:
        """Run the base's own forward up to its language model, and take what it passes in.

        So every family's handling of images is reused instead of rewritten. Nothing of the model is changed: while this runs,
        a hook ends this forward where the language model is called, and no other thread's.

        Args:
            input_ids: prompt ids with placeholders of visual tokens.
            vision: from `watch_vision`, within it, for methods that rank visual tokens by the vision tower.
            inputs: whatever else the base's forward takes (pixel_values, attention_mask, position_ids, …).

        Raises:
            TwigVLMError: the prompt is longer than the context, or the base refuses it, or its visual tokens are not those
                of its projector and `vision` is asked for.
        """
        self.check_context(input_ids, inputs.get("attention_mask"))
        try:
            kwargs = capture(self.decoder, lambda: self.model(input_ids=input_ids, use_cache=False, **inputs))
        except Exception as error:
            if not is_refusal(error):
                raise
            raise TwigVLMError(f"the base refuses this prompt ({one_line(error)}); check its inputs") from error
        hidden, input_ids = cast(Tensor, kwargs["inputs_embeds"]).to(self.device), input_ids.to(self.device)
        mask = inputs.get("attention_mask")
        mask = None if mask is None or bool(mask.all()) else mask.to(self.device)
        positions = kwargs.get("position_ids")
        if mask is not None and (positions is None or (positions.ndim == 2 and "position_ids" not in inputs)):
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        elif positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        positions, attends_until = positions.to(self.device), attention_ends_of(kwargs.get("attention_mask"))
        self.check_positions(positions)
        visual_mask = self.visual_mask(input_ids)
        prompt = Prompt(
            hidden,
            positions.expand(*positions.shape[:-2], len(hidden), -1),
            visual_mask,
            input_ids,
            (hidden.shape[1],) * len(hidden),
            None if attends_until is None else attends_until.to(self.device),
            deepstack_of(hidden, kwargs),
            None if vision is None else vision(hidden, visual_mask),
        )
        return prompt if mask is None else packed(prompt, mask.bool())

    def text_prompt(self, tokens: int) -> Prompt:
        """A prompt of random text, always the same, no longer than the context: to see how layers treat it, or to time them."""
        ids = torch.arange(self.vocabulary)
        ids = ids[~self.visual_mask(ids[None])[0]]
        size, generator = (1, min(tokens, self.context or tokens)), torch.Generator().manual_seed(0)
        picked = torch.randint(len(ids), size, generator=generator, device="cpu")
        return self.prompt(ids[picked].to(self.device))

    def masks(self) -> CausalMasks:
        """Causal masks for the base's attention implementation."""
        grouped = self.config.num_key_value_heads < self.config.num_attention_heads
        half_on_cpu = self.device.type == "cpu" and self.dtype != torch.float32
        single = self.attention == "sdpa" and grouped and half_on_cpu
        return CausalMasks(self.attention, self.dtype, self.device, single)

    def tree_masks(self, ancestors: Bool[Tensor, "rows queries nodes"]) -> TreeMasks:
        """Masks of token trees, by the earlier nodes that each new node sees."""
        return TreeMasks(self.attention, ancestors, self.dtype)

    def token_inputs(self, prompt: Prompt) -> TokenInputs:
        """Per-token inputs of a prompt."""
        inputs, (batch, tokens) = self.rotary(prompt.hidden, prompt.position_ids), prompt.input_ids.shape
        positions = None
        if self.windowed or prompt.attends_until is not None:
            positions = torch.arange(tokens, device=prompt.hidden.device).expand(batch, -1)
        return inputs._replace(positions=positions, attends_until=prompt.attends_until, deepstack=prompt.deepstack)

    def rotary(
        self, hidden: Float[Tensor, "batch tokens width"], position_ids: Int[Tensor, "*axes batch any"]
    ) -> TokenInputs:
        """Rotary embeddings of positions alone; of a prompt, use `token_inputs`.

        Args:
            hidden: states that are to be rotated by them, whose dtype and device they get.
            position_ids: positions; with M-RoPE on 3 axes, or on 4 of which the first does not count.
        """
        embedding = self.decoder.rotary_emb
        if position_ids.ndim == 3:
            position_ids = position_ids[-3:]
        elif hasattr(embedding, "mrope_section"):  # transformers 5.18 takes M-RoPE's positions on three axes only
            position_ids = position_ids.expand(3, -1, -1)
        kinds: tuple[str, ...] = ()
        if self.language_model.rotary_per_layer_type:
            kinds = tuple(sorted(set(self.config.layer_types)))
            parts = zip(*(embedding(hidden, position_ids, kind) for kind in kinds), strict=True)
            cos, sin = (torch.cat(part, dim=-1) for part in parts)
        else:
            cos, sin = embedding(hidden, position_ids)
        return TokenInputs(cos.to(hidden.device), sin.to(hidden.device), kinds)

    def run_layers(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        start: int,
        stop: int,
        inputs: TokenInputs,
        masks: Masks,
        view: CacheView | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Run layers start..stop-1 (from 0); with a view of a cache, on top of what its rows hold.

        Args:
            hidden: input of layer `start`.
            start: first layer.
            stop: layer after the last one; with `start`, the input is returned as it is.
            inputs: inputs of the same tokens.
            masks: masks of the prompt, or of the nodes of a tree.
            view: rows of the cache that take the keys and values, and hold what came before; None: there is no cache.
        """
        after = run(self.layers[start:stop], hidden, inputs, masks, view, start)
        if view is not None and stop > start:
            view.advance(start, stop, hidden.shape[1])
        return after

    def run_layers_with_last_input(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        start: int,
        stop: int,
        inputs: TokenInputs,
        masks: Masks,
        view: CacheView | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens width"]]:
        """The input of layer stop-1, and what `run_layers` returns; arguments as there, start < stop."""
        before_last = run(self.layers[start : stop - 1], hidden, inputs, masks, view, start)
        after = run(self.layers[stop - 1 : stop], before_last, inputs, masks, view, stop - 1)
        if view is not None:
            view.advance(start, stop, hidden.shape[1])
        return before_last, after

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions vocabulary"]:
        """Final norm and head, on the given positions only."""
        with cpu_linear(self.head, hidden):
            return cast(Tensor, self.head(self.norm(hidden)).to(hidden.device))
