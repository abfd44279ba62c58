"""`twigvlm train`: grow a twig on a base and train it on conversations, in one stage or two."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from twigvlm.config import TwigConfig
from twigvlm.training.options import Stage1Config, Stage2Config

FRESH = TwigConfig(pruning_head=True)


@dataclass(frozen=True)
class Common:
    """What both stages need."""

    data: Path
    """Conversations in LLaVA's format or as chat messages, with one, several or no images: a .json, .jsonl or .parquet file, a
    directory of them, or a Hugging Face data set saved to disk."""
    out: Path
    """Directory for the finished twig; checkpoints go to `checkpoints` in it."""
    images: Path | None = None
    """Folder that image paths start from. None: the folder of the file that names them."""
    model: str = "sapling"
    """The base: `sapling` (embedded), a Hugging Face id or a directory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the base. auto: as the base's files say; Sapling's is bfloat16, on a CPU without it float32."""
    device: str = "auto"
    """Where to train: auto (a GPU if there is one, its own for each process), cpu or cuda; CUDA_VISIBLE_DEVICES chooses GPUs."""
    max_length: int | None = None
    """Samples are cut after this many tokens. None: the base's context."""
    strict: bool = False
    """Stop at the first broken sample; otherwise it is reported and skipped."""
    resume: bool = False
    """Continue from the latest checkpoint in `out`, if there is one."""

    def load(self) -> tuple[Any, Any, Any]:
        """Check the options; the samples, the base and its processor."""
        from twigvlm.cli.output import busy
        from twigvlm.errors import TwigVLMError
        from twigvlm.training.distributed import processes

        if self.out.exists() and not self.out.is_dir():
            raise TwigVLMError(f"out {str(self.out)!r}: is a file; name a directory")
        # Others may come when the main process has begun to write.
        if processes.is_main() and self.out.is_dir() and any(self.out.iterdir()) and not self.resume:
            raise TwigVLMError(f"out {str(self.out)!r}: is not empty; add --resume, or choose another directory")
        if self.max_length is not None and self.max_length < 2:
            raise TwigVLMError(f"max_length={self.max_length}: must be 2 or more")
        try:
            import accelerate  # noqa: F401 (transformers' Trainer needs it)
        except ImportError:
            raise TwigVLMError("training needs more packages; run: pip install 'twigvlm[train]'") from None

        from twigvlm.cli.session import load_base
        from twigvlm.training.data.load import load_samples

        with busy(f"Loading {self.model}"):
            base, processor = load_base(self.model, self.dtype, processes.device(self.device))
        with busy("Reading samples"):
            samples = load_samples(self.data, self.images, self.strict)
        return samples, base, processor

    def dataset(self, samples: Any, base: Any, processor: Any) -> Any:
        """The samples as the training reads them."""
        from twigvlm.training.data.dataset import ConversationDataset

        limit = self.max_length or getattr(base.config.get_text_config(), "max_position_embeddings", None)
        return ConversationDataset(samples, processor, limit, self.strict)

    def finish(self, model: Any, data: Any) -> None:
        """Report broken samples and write the twig."""
        from twigvlm.training.distributed import processes

        data.summarise()
        if processes.is_main():
            model.save_pretrained(self.out)
            print(f"Twig: {self.out}")
        processes.finish()


@dataclass(frozen=True)
class Stage1(Common):
    """Grow a twig and distil the base into it: next tokens, the base's predictions, its attention into the P-Head."""

    start: str | None = None
    """Twig to go on with, a directory or a hub id; it keeps its shape. None: a fresh one."""
    twig: TwigConfig = FRESH
    """Shape of a fresh twig."""
    stage1: Stage1Config = field(default_factory=Stage1Config)
    """Settings of the training."""

    def run(self) -> None:
        """Train, and write the twig to `out`."""
        from twigvlm.errors import TwigVLMError

        if self.start is not None and self.twig != FRESH:
            raise TwigVLMError(f"start {self.start!r}: this twig keeps its shape; leave the options of a fresh one out")
        samples, base, processor = self.load()
        from twigvlm.cli.training_progress import TrainingProgress
        from twigvlm.training.distill import train_stage1

        model = self._twig(samples, base, processor)
        data = self.dataset(samples, base, processor)
        with TrainingProgress() as shown:
            train_stage1(model, data, self.stage1, self.out / "checkpoints", self.resume, [shown])
        self.finish(model, data)

    def _twig(self, samples: Any, base: Any, processor: Any) -> Any:
        import torch

        from twigvlm.cli.output import busy
        from twigvlm.model import TwigVLM
        from twigvlm.training.data.dataset import frequent_answer_tokens

        if self.start is not None:
            return TwigVLM.from_pretrained(base, self.start)
        size = self.twig.draft_vocabulary
        with busy("Counting answer tokens"):
            tokens = None if size is None else frequent_answer_tokens(samples, processor, size)
        # A run that is started again before its first checkpoint begins with the same twig.
        torch.manual_seed(self.stage1.seed)
        return TwigVLM.grow(base, self.twig, tokens)


@dataclass(frozen=True)
class Stage2(Common):
    """Train the P-Head of a twig from stage 1 by reinforcement; nothing else of the twig changes."""

    start: str = field(kw_only=True)
    """Twig from stage 1, a directory or a hub id; it stays as it is."""
    stage2: Stage2Config = field(default_factory=Stage2Config)
    """Settings of the training."""

    def run(self) -> None:
        """Train, and write the twig to `out`."""
        samples, base, processor = self.load()
        from twigvlm.cli.training_progress import TrainingProgress
        from twigvlm.model import TwigVLM
        from twigvlm.training.reinforce import train_stage2

        model = TwigVLM.from_pretrained(base, self.start)
        data = self.dataset(samples, base, processor)
        with TrainingProgress() as shown:
            train_stage2(model, data, self.stage2, self.out / "checkpoints", self.resume, [shown])
        self.finish(model, data)


@dataclass(frozen=True)
class Train:
    """Grow a twig on a base and train it on conversations; the base stays as it is."""

    stage: Annotated[
        Annotated[Stage1, tyro.conf.subcommand("stage1")] | Annotated[Stage2, tyro.conf.subcommand("stage2")],
        tyro.conf.OmitSubcommandPrefixes,
    ]

    def run(self) -> None:
        """Run the chosen stage."""
        self.stage.run()
