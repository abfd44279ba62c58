"""Settings of a training run, as frozen dataclasses; the command line's options and help are made from them."""

from dataclasses import dataclass

from twigvlm.errors import TwigVLMError


@dataclass(frozen=True)
class Stage1Config:
    """Stage 1: next-token loss on answers. The defaults of optimiser and schedule are the published ones (§4.1)."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW (betas 0.9 and 0.98, no weight decay), on a cosine."""
    warmup: float = 0.03
    """Part of all steps that the learning rate rises linearly."""
    batch_size: int = 8
    """Samples in one forward pass."""
    accumulate: int = 1
    """Forward passes per optimiser step; batch_size x accumulate was 128 in the paper."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimiser steps, instead of epochs."""
    save_steps: int = 500
    """Optimiser steps between checkpoints."""
    log_steps: int = 10
    """Optimiser steps between log lines."""
    workers: int = 0
    """Processes that read and prepare images beside the training."""
    seed: int = 0
    """Seed of the sample order."""
    tensorboard: bool = False
    """Log to TensorBoard as well."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise TwigVLMError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise TwigVLMError(f"{name}={getattr(self, name):g}: must be more than 0")
        if not 0 <= self.warmup < 1:
            raise TwigVLMError(f"warmup={self.warmup:g}: must be at least 0 and less than 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise TwigVLMError(f"max_steps={self.max_steps}: must be 1 or more")
        if self.workers < 0:
            raise TwigVLMError(f"workers={self.workers}: must be 0 or more")
