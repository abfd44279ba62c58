"""What no base can be, refused before a twig grows on it."""

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
