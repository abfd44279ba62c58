"""Options that several commands have; what they say in `--help` is written here or in `twigvlm.config`, once."""

from dataclasses import dataclass
from typing import Literal

from twigvlm.config import Speculate


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """Which base to load, and how."""

    model: str = "sapling"
    """The base: `sapling` (embedded), a Hugging Face id or a directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights. auto: as the base's files say; Sapling's is bfloat16, or float32 on a CPU that has no
    bfloat16 arithmetic."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BaseOptions):
    """A base and its twig, and where to run them."""

    twig: str | None = None
    """Twig that was grown on the base: a directory or a hub id. None: on Sapling its own, otherwise no twig."""
    device: str = "auto"
    """Where to run: auto (a GPU if there is one), cpu, cuda, cuda:1, mps, …"""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ModelOptions):
    """How long an answer may become."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(AnswerOptions):
    """Questions about one image, through a twig; Sapling's own image unless told otherwise."""

    image: str | None = None
    """Image file, or a data URI. None: the scene that ships with the package."""
    retain: float | None = 64
    speculate: Speculate = "chain"
