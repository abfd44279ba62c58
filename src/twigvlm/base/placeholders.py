"""Placeholders of images and videos in a prompt, and whether the pixels beside it match them."""

from itertools import accumulate
from typing import Any

from jaxtyping import Int
from torch import Tensor

from twigvlm.base.families import Visual
from twigvlm.errors import TwigVLMError

_PER_TOKEN = ("attention_mask", "token_type_ids", "mm_token_type_ids")


def check_per_token(input_ids: Int[Tensor, "batch tokens"], inputs: dict[str, Any]) -> None:
    """Raise TwigVLMError unless the inputs that have an entry for each token have one for each.

    Args:
        input_ids: prompt ids.
        inputs: what else the base's forward takes.
    """
    for name in _PER_TOKEN:
        given = inputs.get(name)
        if given is not None and given.shape != input_ids.shape:
            raise TwigVLMError(
                f"{name} has shape {list(given.shape)}, but input_ids has {list(input_ids.shape)}: "
                "shorten both or neither"
            )


def check_placeholders(
    config: Any, token: int, visual: Visual, input_ids: Int[Tensor, "batch tokens"], inputs: dict[str, Any]
) -> None:
    """Raise TwigVLMError unless placeholders and pixels of one kind come together and, as far as the inputs tell, match.

    Args:
        config: of the base.
        token: id of the kind's placeholders.
        visual: the kind.
        input_ids: prompt ids.
        inputs: what else the base's forward takes.
    """
    counts = (input_ids == token).sum(dim=1).tolist()
    pixels = next((inputs[name] for name in visual.pixels if inputs.get(name) is not None), None)
    if pixels is not None and not any(counts):
        raise TwigVLMError(
            f"No {visual.kind} placeholder in the prompt: put {visual.article} {visual.kind} into the chat messages, "
            f"or the processor's {visual.kind} token into the text, and pass both through the processor"
        )
    if pixels is None and any(counts):
        raise TwigVLMError(
            f"{sum(counts)} {visual.kind} placeholders but no {visual.kind}: pass {visual.pixels[0]} from the processor"
        )
    if pixels is not None:
        _check_counts(config, visual, counts, pixels, inputs)


def _check_counts(config: Any, visual: Visual, counts: list[int], pixels: Tensor, inputs: dict[str, Any]) -> None:
    """Raise TwigVLMError unless every prompt of a batch has the placeholders of whole images."""
    if visual.grid is not None:
        grid = inputs.get(visual.grid)
        if grid is None:
            raise TwigVLMError(f"{visual.grid} is missing: pass it from the processor, with {visual.pixels[0]}")
        merged = config.vision_config.spatial_merge_size**2
        tokens = (grid.prod(dim=-1) // merged).tolist()
        made = f"{len(tokens)} {visual.kind}s of {sum(tokens)} visual tokens"
    elif pixels.ndim == 4 and inputs.get("image_sizes") is None:  # images of one size, or tiles of them
        tokens = [sum(counts) // len(pixels)] * len(pixels)
        made = f"{len(pixels)} {visual.kind}s of equal size"
    else:
        return  # only the base knows what it makes of other pixels; it counts that itself
    if sum(tokens) != sum(counts) or not {0, *accumulate(tokens)}.issuperset(accumulate(counts)):
        raise TwigVLMError(
            f"{' + '.join(map(str, counts))} {visual.kind} placeholders do not match {made}: "
            "pass the processor's outputs as they are, made without truncation"
        )
