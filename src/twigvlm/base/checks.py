"""What no base can be, refused before a twig grows on it."""

from typing import Any

from torch import nn

from twigvlm.errors import TwigVLMError


def check_model(model: object) -> None:
    """Raise TwigVLMError unless this is a model without a twig and without adapters."""
    if not isinstance(model, nn.Module):
        raise TwigVLMError(f"base: is {type(model).__name__}; pass a loaded Hugging Face model")
    if hasattr(model, "twig"):
        raise TwigVLMError("base: has a twig already; pass its model")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise TwigVLMError(
            "the base has adapters that are not merged: call merge_and_unload() and pass what it returns"
        )


def check_rope(config: Any) -> None:
    """Raise TwigVLMError if rotary frequencies change while a sequence grows: tables made ahead would not follow them."""
    for parameters in _rotary(config):
        rope_type = parameters.get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            raise TwigVLMError(f"rope_type={rope_type!r} is not supported: use a base with fixed rotary frequencies")


def has_mrope(config: Any) -> bool:
    """Whether positions have a time, a row and a column, so that a picture takes no more of them than its longer side."""
    return any("mrope_section" in parameters for parameters in _rotary(config))


def _rotary(config: Any) -> list[dict[str, Any]]:
    """The parameters of a decoder's rotary embeddings: one set, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
