"""Load a base with its twig, and make its inputs; shared by all commands."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from twigvlm import inputs, loading
from twigvlm.cli.output import busy
from twigvlm.config import WITHOUT_TWIG, PruningConfig, Speculate
from twigvlm.errors import TwigVLMError
from twigvlm.images import Picture
from twigvlm.inputs import user_turn
from twigvlm.loading import default_twig, without_twig
from twigvlm.model import TwigVLM
from twigvlm.pruning.methods import make_pruner


@dataclasses.dataclass(frozen=True)
class SessionConfig:
    """Which base and twig to load, and how to prune and draft. `resolve` rejects combinations that are not possible."""

    model: str
    twig: str | None
    pruning: PruningConfig
    speculate: Speculate

    @property
    def accelerated(self) -> bool:
        """Whether `TwigVLM.generate` is needed: with a twig, or with a method that needs none."""
        return self.twig is not None or self.without_twig

    @property
    def without_twig(self) -> bool:
        """Whether there is no twig, but pruning or drafting by a method that needs none."""
        return self.twig is None and (self.pruning.pruner not in (None, "twig") or self.speculate != "none")

    @property
    def generate_options(self) -> dict[str, Any]:
        """Arguments of `TwigVLM.generate`."""
        return {**dataclasses.asdict(self.pruning), "speculate": self.speculate}

    @classmethod
    def resolve(
        cls, model: str, twig: str | None, pruning: PruningConfig, speculate: Speculate | None = None
    ) -> "SessionConfig":
        """Fill in the defaults: Sapling has a twig of its own, and a twig speculates unless told not to."""
        retain = pruning.retain
        if retain is not None and not math.isfinite(retain):
            raise TwigVLMError(f"retain={retain}: must be a number of visual tokens, for example 64")
        idle = not pruning.active and speculate == "none"
        if twig is not None and idle:
            raise TwigVLMError(
                f"twig {twig!r}: has nothing to do; add --retain 64 or --speculate chain, or leave --twig out"
            )
        if twig is None and not idle:
            twig = default_twig(model)
        prunes = pruning.active and pruning.pruner in (None, "twig")  # by the twig
        if pruning.pruner is not None and not prunes:
            make_pruner(pruning.pruner)  # for its errors, before a model is loaded
        if twig is None and (prunes or speculate not in (None, *WITHOUT_TWIG)):
            asked = f"--speculate {speculate}"
            if prunes:
                asked = f"--keep {pruning.keep}" if retain is None else f"--retain {retain:g}"
            raise TwigVLMError(
                f"{asked}: needs a twig for {model!r}; give --twig DIR, or train one with 'twigvlm train stage1 --model {model}'"
            )
        if speculate is None:
            speculate = "none" if twig is None else "chain"
        return cls(model, twig, pruning, speculate)


@dataclasses.dataclass(frozen=True)
class Session:
    """A loaded base with its processor, and the twig's model where the config has one."""

    config: SessionConfig
    base: Any
    processor: Any
    model: TwigVLM | None

    def settings(self) -> dict[str, Any]:
        """Model, twig, data type and device, JSON-able."""
        dtype = str(self.base.dtype).removeprefix("torch.")
        return {"model": self.config.model, "twig": self.config.twig, "dtype": dtype, "device": str(self.base.device)}


def open_session(config: SessionConfig, dtype: str, device: str) -> Session:
    """Load what the config names, showing progress; with `auto`, also measure the costs of drafting."""
    _silence_libraries()
    with busy(f"Loading {config.model}"):
        base, processor, model = loading.load(config.model, config.twig, dtype, device)
        if config.without_twig:
            model = without_twig(base, exits=config.speculate == "exit")
        session = Session(config, base, processor, model)
    if session.model is not None and config.speculate == "auto":
        with busy("Measuring what drafts cost on this machine"):
            session.model.costs()  # kept for all answers, and part of no answer's time
    return session


def load_base(name: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load a base and its processor as `twigvlm.loading.load_base` does, without the libraries' loading messages."""
    _silence_libraries()
    return loading.load_base(name, dtype, device)


def _silence_libraries() -> None:
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def build_inputs(
    base: Any, processor: Any, images: Sequence[Picture | Sequence[Picture]], prompts: Sequence[str]
) -> dict[str, Any]:
    """The base's inputs for a batch of prompts, each a user turn of its picture or list of pictures, and the text."""
    turns = [[user_turn(prompt, given)] for prompt, given in zip(prompts, images, strict=True)]
    return inputs.build_inputs(processor, turns, base.device, base.dtype)


def default_picture() -> Path:
    """Path of the scene that ships with the package."""
    from importlib.resources import files

    return Path(str(files("twigvlm.sapling") / "demo.png"))
