"""BaseVLM: an unmodified Hugging Face vision-language model, opened at its layers."""

from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from twigvlm.base.cache import LayeredCache
from twigvlm.base.families import family_of
from twigvlm.base.layers import run
from twigvlm.base.masks import CausalMasks, Masks, PaddedMasks, check_attention
from twigvlm.base.positions import Rope
from twigvlm.errors import TwigVLMError


@dataclass(frozen=True)
class Prompt:
    """What the base hands to its language model: text and visual tokens merged, nothing decoded yet."""

    hidden: Float[Tensor, "batch tokens width"]
    """Merged embeddings."""
    position_ids: Int[Tensor, "batch tokens"]
    """Position of each token."""
    visual_mask: Bool[Tensor, "batch tokens"]
    """True at visual tokens."""
    attention_mask: Shaped[Tensor, "batch tokens"] | None
    """0 at padding; None if there is none."""
    input_ids: Int[Tensor, "batch tokens"]
    """The ids, placeholders included."""


class _Captured(Exception):
    """Ends the base's forward once the arguments of its language model are known."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs


class BaseVLM:
    """The base's parts by the names that the method uses; layers are counted from 0, ranges exclude their end.

    Raises:
        TwigVLMError: the model's family, attention implementation or position embedding is not supported.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family = family_of(model)
        self.decoder: Any = _at(model, self.family.decoder)
        self.layers: list[nn.Module] = list(_at(self.decoder, self.family.layers))
        self.norm: Any = _at(self.decoder, self.family.norm)
        self.head: Any = _at(model, self.family.head)
        self.config: Any = self.decoder.config
        self.embed: Any = model.get_input_embeddings()
        check_attention(self.attention)
        # These change their frequencies while a sequence grows; tables made ahead would not follow them.
        rope_type = (getattr(self.config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise TwigVLMError(f"rope_type={rope_type!r} is not supported: use a base with fixed rotary frequencies")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def attention(self) -> str:
        """The attention implementation of the decoder."""
        return str(self.config._attn_implementation)

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's weights."""
        return next(self.decoder.parameters()).dtype

    def visual_mask(self, input_ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """True where a placeholder stands for a visual token."""
        ids = [getattr(self.model.config, name) for name in self.family.visual_token_ids]
        return reduce(torch.logical_or, [input_ids == i for i in ids])

    def check_images(self, input_ids: Int[Tensor, "batch tokens"], inputs: dict[str, Any]) -> None:
        """Raise TwigVLMError unless placeholders and pixels come together, in a number that the family takes."""
        images = sum(len(inputs[name]) for name in self.family.pixel_inputs if inputs.get(name) is not None)
        placeholders = int(self.visual_mask(input_ids).sum())
        if not placeholders:
            raise TwigVLMError(
                "No image placeholder in the prompt: put an image into the chat messages, or the processor's image token "
                "into the text, and pass both through the processor"
            )
        if not images:
            raise TwigVLMError(
                f"{placeholders} image placeholders but no image: pass {self.family.pixel_inputs[0]} from the processor"
            )
        most = self.family.images_per_prompt
        if most is not None and images > most * len(input_ids):
            raise TwigVLMError(
                f"{images} images in the prompt: {self.family.model_type} takes {most} per prompt; pass one and ask again"
            )

    def prompt(self, input_ids: Int[Tensor, "batch tokens"], **inputs: Any) -> Prompt:
        """Run the base's own forward up to its language model, and take what it passes in.

        So every family's handling of images is reused instead of rewritten. Nothing of the model is changed: a hook
        records the arguments, ends the forward and is removed.

        Args:
            input_ids: prompt ids with image placeholders.
            inputs: whatever else the base's forward takes (pixel_values, attention_mask, position_ids, …).

        Raises:
            TwigVLMError: the prompt is longer than the context, or the base refuses it.
        """
        context = getattr(self.config, "max_position_embeddings", None)
        if context is not None and input_ids.shape[1] > context:
            raise TwigVLMError(
                f"The prompt has {input_ids.shape[1]} tokens, the base's context only {context}: shorten the text"
            )

        def capture(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Captured(kwargs)

        hook = self.decoder.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            self.model(input_ids=input_ids, use_cache=False, **inputs)
        except _Captured as captured:
            kwargs = captured.kwargs
        except ValueError as error:  # for example more pixels than placeholders
            raise TwigVLMError(f"the base refuses this prompt: {' '.join(str(error).split())}") from error
        finally:
            hook.remove()
        hidden = cast(Tensor, kwargs["inputs_embeds"])
        mask = kwargs.get("attention_mask")
        if mask is not None and bool(mask.all()):
            mask = None
        positions = kwargs.get("position_ids")
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        elif positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        return Prompt(hidden, positions, self.visual_mask(input_ids), mask, input_ids)

    def masks(self, prompt: Prompt, rows: int = 1, new_tokens: int = 0) -> Masks:
        """The masks of a request: `rows` tokens at most in a step, `new_tokens` at most in all."""
        if prompt.attention_mask is not None:
            return PaddedMasks(self.attention, prompt.attention_mask, prompt.hidden.dtype)
        columns = prompt.hidden.shape[1] + new_tokens + rows
        dtype, device = prompt.hidden.dtype, prompt.hidden.device
        grouped = self.config.num_key_value_heads < self.config.num_attention_heads
        single = self.attention == "sdpa" and grouped and device.type == "cpu" and dtype != torch.float32
        return CausalMasks(self.attention, rows, columns, dtype, device, single)

    def rotary(self, hidden: Float[Tensor, "batch tokens width"], position_ids: Int[Tensor, "batch any"]) -> Rope:
        """(cos, sin) of positions, in the dtype and on the device of `hidden`."""
        return cast(Rope, _at(self.decoder, self.family.rotary)(hidden, position_ids))

    def run_layers(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        start: int,
        stop: int,
        rope: Rope,
        masks: Masks,
        cache: LayeredCache | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Run layers start..stop-1 (from 0); with a cache, on top of what it holds."""
        return run(self.layers[start:stop], hidden, rope, masks, cache, start)

    def logits(self, hidden: Float[Tensor, "*positions width"]) -> Float[Tensor, "*positions vocabulary"]:
        """Final norm and head, on the given positions only."""
        return cast(Tensor, self.head(self.norm(hidden)))


def _at(root: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), root)
