"""What differs between model families, as data. Nothing outside this file knows a family's name."""

from dataclasses import dataclass
from typing import Any

from twigvlm.errors import TwigVLMError


@dataclass(frozen=True)
class Family:
    """Where a family keeps the parts that pruning and speculation need. Paths are dotted, from the model's top."""

    model_type: str
    """`config.model_type` of the top-level model."""
    decoder: str
    """The language model: the module that is called with the merged embeddings; it owns layers, norm and rotary."""
    head: str = "lm_head"
    """The language-model head."""
    layers: str = "layers"
    """The decoder layers, below `decoder`."""
    norm: str = "norm"
    """The norm before the head, below `decoder`."""
    rotary: str = "rotary_emb"
    """The rotary embedding, below `decoder`; called with (hidden, position_ids)."""
    visual_token_ids: tuple[str, ...] = ("image_token_id",)
    """Attributes of the config that name the placeholder ids of visual tokens."""
    pixel_inputs: tuple[str, ...] = ("pixel_values",)
    """Arguments of the model's forward that carry pixels; their first dimension counts images."""
    images_per_prompt: int | None = None
    """Most images a prompt may hold; None: any number."""


FAMILIES: tuple[Family, ...] = (Family(model_type="llava", decoder="model.language_model", images_per_prompt=1),)


def family_of(model: Any) -> Family:
    """The family of a Hugging Face model.

    Raises:
        TwigVLMError: the model's type is in no entry of `FAMILIES`.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise TwigVLMError(
        f"model type {model_type!r} is not supported (supported: {known}): it needs an entry in "
        "twigvlm/base/families.py that says where its decoder, head and visual placeholder ids are"
    )
