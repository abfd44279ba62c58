"""Settings of a training run, as frozen dataclasses; the command line's options and help are generated from them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from math import isfinite

from twigvlm.config import at_least, check_number
from twigvlm.errors import TwigVLMError

KEEP_BUDGETS = (41, 72, 103, 134, 165, 196, 227)
"""R of the published stage 2 (Eq. 16): R̄ 64 to 192 of 576 visual tokens, with K = 2, K_f = 24 and L = 32 (Table 7)."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of every training. Defaults are those published for the twig (§4.1)."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW (betas 0.9 and 0.98, no weight decay), with a cosine schedule."""
    warmup: float = 0.03
    """Fraction of all steps during which the learning rate rises linearly."""
    batch_size: int = 8
    """Samples in one forward pass of one process."""
    accumulate: int = 1
    """Forward passes per optimiser step; batch_size x accumulate x processes was 128 in the paper."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Number of optimiser steps, instead of epochs."""
    save_steps: int = 500
    """Optimiser steps between checkpoints."""
    log_steps: int = 10
    """Optimiser steps between log lines."""
    workers: int = 0
    """Additional processes that read and prepare images."""
    seed: int = 0
    """Random seed of a fresh twig, the order of samples, and the draws of a stage."""
    tensorboard: bool = False
    """Also log to TensorBoard."""

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(1, save_steps=self.save_steps, log_steps=self.log_steps)
        self._more_than_0("learning_rate", "epochs")
        check_number("warmup", self.warmup)
        if not 0 <= self.warmup < 1:
            raise TwigVLMError(f"warmup={self.warmup:g}: must be at least 0 and less than 1")
        if self.max_steps is not None:
            at_least(1, max_steps=self.max_steps)
            self._does_not_apply(f"with max_steps={self.max_steps}", "epochs")
        at_least(0, workers=self.workers, seed=self.seed)
        if self.seed >= 2**32:  # NumPy's limit, which the Trainer seeds too
            raise TwigVLMError(f"seed={self.seed}: must be 0 or more, and less than 2^32")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise TwigVLMError("tensorboard: is not installed; run: pip install 'twigvlm[train]'")

    def _more_than_0(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            check_number(name, value)
            if not (value > 0 and isfinite(value)):
                raise TwigVLMError(f"{name}={value:g}: must be more than 0, and finite")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            check_number(name, value)
            if not (value >= 0 and isfinite(value)):
                raise TwigVLMError(f"{name}={value:g}: must be 0 or more")

    def _does_not_apply(self, where: str, *names: str) -> None:
        """Refuse options that do nothing, where they differ from their defaults."""
        defaults = {option.name: option.default for option in fields(self)}
        for name in names:
            value = getattr(self, name)
            if value != defaults[name]:
                shown = spaced(value if isinstance(value, tuple) else (value,))
                raise TwigVLMError(f"{name}={shown}: does not apply {where}; leave it out")


@dataclass(frozen=True)
class ProjectorConfig(TrainingConfig):
    """Tuning the projector for VisionZip's merged tokens (VisionZip‡)."""

    learning_rate: float = 2e-5
    """Peak learning rate of AdamW (betas 0.9 and 0.98, no weight decay), with a cosine schedule."""
    retain: float = 64
    """R̄: visual tokens that VisionZip keeps of each sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("retain", self.retain)
        if not (self.retain > 0 and isfinite(self.retain)):
            raise TwigVLMError(f"retain={self.retain:g}: must be a number of visual tokens, for example 64")


@dataclass(frozen=True)
class StageConfig(TrainingConfig):
    """Settings of both stages of a twig."""

    teacher_layers: tuple[int, ...] | None = None
    """Base layers (from 1) whose attention, averaged, the P-Head learns. None: the one at 5/8 of the layers, rounded; layer 20 of
    32, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_layers is not None and (not self.teacher_layers or min(self.teacher_layers) < 1):
            raise TwigVLMError(
                f"teacher_layers={spaced(self.teacher_layers)}: must be one or more layers, counted from 1"
            )


@dataclass(frozen=True)
class Stage1Config(StageConfig):
    """Stage 1, distillation: L_NTP + α·L_PredKL + γ·L_AttnKL (Eq. 9-11). α = γ = 0 is the recipe of the first TwigVLM."""

    alpha: float = 0.1
    """α: weight of L_PredKL, the divergence from the base's predictions. 0: off."""
    gamma: float = 1.0
    """γ: weight of L_AttnKL, the divergence from the base's attention; needs a twig with a P-Head. 0: off."""
    gamma_answers: float = 0.0
    """Weight of the same divergence at the tokens of answers, whose attention shows what the next tokens need; for twigs that
    refocus. 0: off, as published."""
    temperature: float = 5.0
    """Temperature that softens both predictions; L_PredKL is multiplied by its square."""
    clip: float = 4.0
    """Limit on the L_PredKL of a token. The loss is divided by this limit; above it, the gradient is scaled down to the limit
    rather than cut off."""
    gradient_checkpointing: bool = False
    """Compute each twig layer again in the backward pass instead of storing its activations: less memory, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._not_negative("alpha", "gamma", "gamma_answers")
        self._more_than_0("temperature", "clip")
        if not self.alpha:
            self._does_not_apply("where alpha=0", "temperature", "clip")
        if not (self.gamma or self.gamma_answers):
            self._does_not_apply("where gamma=0 and gamma_answers=0", "teacher_layers")


@dataclass(frozen=True)
class Stage2Config(StageConfig):
    """Stage 2, reinforcement learning of the P-Head (Eq. 12-16). Defaults are the published ones, except for what has to be
    given: 391 steps (max_steps; otherwise it sees all of the data once) of 128 samples (batch_size x accumulate x processes)."""

    learning_rate: float = 2e-5
    """Peak learning rate of AdamW (betas 0.9 and 0.98, no weight decay), with a cosine schedule."""
    save_steps: int = 50
    """Optimiser steps between checkpoints; fewer than in stage 1, since a step takes longer."""
    group: int = 32
    """G: number of prunings drawn for each sample."""
    chunk: int | None = None
    """Prunings that the base runs at once; fewer need less memory. None: those of a whole batch, batch_size x G."""
    span: int | None = None
    """For twigs that refocus: choose at the end of the prompt or after every span-th token of the answer, with equal
    probability, and reward the choice by the next `span` tokens only. None: at the end of the prompt, by the whole answer, as
    published."""
    keep_budgets: tuple[int, ...] | None = None
    """Budgets R, visual tokens kept in layers K+1..K_f, ascending; each step draws one (dynamic pruning ratio).
    None: 41 72 103 134 165 196 227, as published, unless budgets are given."""
    budgets: tuple[float, ...] | None = None
    """Budgets R̄, averages over all layers, ascending, in place of keep_budgets; R follows from the visual tokens of each sample.
    None: those of keep_budgets."""
    beta: float = 8.0
    """β_max: at the end of training the i-th budget is drawn with probability ∝ exp(-β_max·i); at the beginning all budgets are
    equally likely."""
    power: float = 2.0
    """p: β grows with the p-th power of the fraction of steps done."""
    gamma: tuple[float, float] = (1.0, 2.0)
    """Weights of L_AttnKL, a regulariser, at the lowest and the highest budget, linear between them. 0 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, group=self.group)  # rewards are compared with their mean
        for name in ("chunk", "span"):
            if (value := getattr(self, name)) is not None:
                at_least(1, **{name: value})
        if self.budgets is not None and self.keep_budgets is not None:
            raise TwigVLMError(
                f"budgets={spaced(self.budgets)} and keep_budgets={spaced(self.keep_budgets)}: give only one of them"
            )
        for name, levels in (("budgets", self.budgets), ("keep_budgets", self.keep_budgets)):
            if levels is not None and (not levels or list(levels) != sorted(set(levels))):
                raise TwigVLMError(f"{name}={spaced(levels)}: must be one or more numbers in ascending order")
        for level in self.keep_budgets or ():
            at_least(1, keep_budgets=level)
        self._not_negative("beta")
        self._more_than_0("power")
        if not all(weight >= 0 and isfinite(weight) for weight in self.gamma):
            raise TwigVLMError(f"gamma={self.gamma[0]:g} {self.gamma[1]:g}: both must be 0 or more")
        if not any(self.gamma):
            self._does_not_apply("where gamma=0 0", "teacher_layers")
        if len(self.budgets or self.keep_budgets or KEEP_BUDGETS) == 1 and self.beta:
            self._does_not_apply("with a single budget", "beta", "power")
        if not self.beta:
            self._does_not_apply("where beta=0", "power")

    def resolve(self) -> "Stage2Config":
        """These settings, with the published budgets if none are given."""
        given = self.budgets is not None or self.keep_budgets is not None
        return self if given else replace(self, keep_budgets=KEEP_BUDGETS)


def spaced(levels: Sequence[float]) -> str:
    """Budgets as a user writes them."""
    return " ".join(f"{level:g}" for level in levels) or "none"
