"""Options shared by several commands. Their help texts are written once, here or in `twigvlm.config`."""

from dataclasses import dataclass
from typing import Literal

from twigvlm.config import Speculate

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """Which base model to load, and how."""

    model: str = "sapling"
    """Base model: `sapling` (embedded), a Hugging Face id, or a directory."""
    dtype: Dtype = "auto"
    """Data type of the weights. auto: as stored in the base's files; for Sapling bfloat16, or float32 on a CPU without bfloat16
    arithmetic."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BaseOptions):
    """A base and its twig, and where to run them."""

    twig: str | None = None
    """Twig that belongs to the base: a directory or a hub id. None: for Sapling its own twig, otherwise no twig."""
    device: str = "auto"
    """Where to run: auto (a GPU if there is one), cpu, cuda, cuda:1, mps, …"""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ModelOptions):
    """How long an answer may be."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(AnswerOptions):
    """Questions about one image, answered with a twig; by default about the image that ships with the package."""

    image: str | None = None
    """Image file, or a data URI. None: the scene that ships with the package."""
    retain: float | None = 64
    speculate: Speculate = "chain"
