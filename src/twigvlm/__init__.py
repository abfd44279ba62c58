"""Faster vision-language models: a twig prunes visual tokens and drafts the tokens of the answer."""

from typing import TYPE_CHECKING, Any

from twigvlm.config import PruningConfig, SpeculationConfig, TwigConfig
from twigvlm.errors import TwigVLMError

if TYPE_CHECKING:
    from twigvlm.base.cpu_linear import alone_in_process
    from twigvlm.hf.generate import TwigOutput
    from twigvlm.model import TwigVLM

__version__ = "0.2.0"

__all__ = [
    "PruningConfig",
    "SpeculationConfig",
    "TwigConfig",
    "TwigOutput",
    "TwigVLM",
    "TwigVLMError",
    "__version__",
    "alone_in_process",
]


def __getattr__(name: str) -> Any:
    """Import the model, and torch and transformers with it, only when it is asked for: `twigvlm --help` needs neither."""
    if name == "alone_in_process":
        from twigvlm.base.cpu_linear import alone_in_process

        return alone_in_process
    if name in ("TwigOutput", "TwigVLM"):
        from twigvlm import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
