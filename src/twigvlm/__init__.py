"""Grow a twig on a vision-language model: prune visual tokens, draft answer tokens, keep the answer."""

from twigvlm.config import PruningConfig, SpeculationConfig, TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigOutput, TwigVLM

__all__ = ["PruningConfig", "SpeculationConfig", "TwigConfig", "TwigOutput", "TwigVLM", "TwigVLMError"]
