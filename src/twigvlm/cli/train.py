"""`twigvlm train`: grow a twig on a base and train it on conversations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from twigvlm.config import TwigConfig
from twigvlm.training.options import Stage1Config


@dataclass(frozen=True)
class Train:
    """Grow a twig on a base and train it on conversations (stage 1); the base stays as it is."""

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
    """Number format of the base. auto: as the base's files say; bfloat16 for Sapling."""
    device: str = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    max_length: int | None = None
    """Samples are cut after this many tokens. None: the base's context."""
    strict: bool = False
    """Stop at the first broken sample; otherwise it is reported and skipped."""
    resume: bool = False
    """Continue from the latest checkpoint in `out`, if there is one."""
    twig: TwigConfig = field(default_factory=TwigConfig)
    """Shape of the twig."""
    stage1: Stage1Config = field(default_factory=Stage1Config)
    """Settings of the training."""

    def run(self) -> None:
        """Train, and write the twig to `out`."""
        from twigvlm.cli.output import busy
        from twigvlm.errors import TwigVLMError

        if self.out.exists() and not self.out.is_dir():
            raise TwigVLMError(f"out {str(self.out)!r}: is a file; name a directory")
        if self.out.is_dir() and any(self.out.iterdir()) and not self.resume:
            raise TwigVLMError(f"out {str(self.out)!r}: is not empty; add --resume, or choose another directory")
        if self.max_length is not None and self.max_length < 2:
            raise TwigVLMError(f"max_length={self.max_length}: must be 2 or more")
        try:
            import accelerate  # noqa: F401 (transformers' Trainer needs it)
        except ImportError:
            raise TwigVLMError("training needs more packages; run: pip install 'twigvlm[train]'") from None

        from twigvlm.base.families import family_of
        from twigvlm.cli.session import load_base
        from twigvlm.cli.training_progress import TrainingProgress
        from twigvlm.model import TwigVLM
        from twigvlm.training.data import ConversationDataset, frequent_answer_tokens
        from twigvlm.training.reading import load_samples
        from twigvlm.training.stage1 import train_stage1

        with busy(f"Loading {self.model}"):
            base, processor = load_base(self.model, self.dtype, self.device)
        most = family_of(base).images_per_prompt
        with busy("Reading samples"):
            samples = load_samples(self.data, self.images, most, self.strict)
        size = self.twig.draft_vocabulary
        with busy("Counting answer tokens"):
            tokens = None if size is None else frequent_answer_tokens(samples, processor, size)
        model = TwigVLM.grow(base, self.twig, tokens)
        limit = self.max_length or getattr(base.config.get_text_config(), "max_position_embeddings", None)
        dataset = ConversationDataset(samples, processor, limit, most, self.strict)
        callback = TrainingProgress()
        train_stage1(model, dataset, self.stage1, self.out / "checkpoints", self.resume, [callback])
        dataset.summarise()
        model.save_pretrained(self.out)
        print(f"Twig: {self.out}")
