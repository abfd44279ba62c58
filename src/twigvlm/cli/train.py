"""`twigvlm train`: grow a twig on a base and train it in one stage or two, or make what published methods need."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from twigvlm.cli.options import BaseOptions
from twigvlm.config import TwigConfig, at_least
from twigvlm.training.options import ProjectorConfig, Stage1Config, Stage2Config

FRESH = TwigConfig(pruning_head=True)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(BaseOptions):
    """Options of all trainings."""

    makes: ClassVar[str] = "Twig"
    continues: ClassVar[bool] = True
    continuation: ClassVar[str] = "run the same command with --resume to continue from the latest checkpoint"

    data: Path
    """Conversations in LLaVA's format or as chat messages, with one, several or no images: a .json, .jsonl or .parquet file, a
    directory of them, or a Hugging Face data set saved to disk."""
    out: Path
    """Directory for what is trained; checkpoints go to `checkpoints` inside it."""
    images: Path | None = None
    """Folder that image paths are relative to. None: the folder of the file that names them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    """Where to train: auto (a GPU if there is one, a different one for each process), cpu or cuda. CUDA_VISIBLE_DEVICES selects
    GPUs."""
    max_length: int | None = None
    """Samples are cut after this many tokens. None: the length of the base's context."""
    strict: bool = False
    """Stop at the first broken sample; otherwise it is reported and skipped."""
    resume: bool = False
    """Continue from the latest checkpoint in `out`, if there is one."""

    def run(self) -> None:
        """Train, and write the result to `out`."""
        from twigvlm.errors import TwigVLMError
        from twigvlm.files import reserved
        from twigvlm.training.distributed import processes

        if self.max_length is not None:
            at_least(2, max_length=self.max_length)
        try:
            import accelerate  # noqa: F401 (transformers' Trainer needs it)
        except ImportError:
            raise TwigVLMError("training needs more packages; run: pip install 'twigvlm[train]'") from None

        try:
            with reserved(self.out, "out") if processes.is_main() else nullcontext():
                self._run()
        except KeyboardInterrupt:
            if processes.is_main():
                raise
            sys.exit(130)  # as after Ctrl-C; what to do then is said by the main process alone
        processes.finish()

    def _run(self) -> None:
        from twigvlm.cli.output import busy
        from twigvlm.cli.session import load_base
        from twigvlm.cli.training_progress import TrainingProgress
        from twigvlm.errors import TwigVLMError
        from twigvlm.files import LOCK
        from twigvlm.training.data.dataset import ConversationDataset
        from twigvlm.training.data.load import load_samples
        from twigvlm.training.distributed import processes

        # Others may come when the main process has begun to write.
        if processes.is_main() and not self.resume and any(file.name != LOCK for file in self.out.iterdir()):
            remedy = "add --resume, or choose another directory" if self.continues else "choose another directory"
            raise TwigVLMError(f"out {str(self.out)!r}: is not empty; {remedy}")
        self.check()
        with busy("Reading samples"):
            samples = load_samples(self.data, self.images, self.strict)
        with busy(f"Loading {self.model}"):
            base, processor = load_base(self.model, self.dtype, processes.device(self.device))
        untrained = self.prepare(base, samples, processor)
        data = ConversationDataset(samples, processor, self.max_length, self.strict)
        with TrainingProgress(f"Training the {self.makes.lower()}") as progress:
            trained = self.train(untrained, data, self.out / "checkpoints", progress)
        data.summarise()
        if processes.is_main():
            trained.save_pretrained(self.out)
            print(f"{self.makes}: {self.out}")

    def check(self) -> None:
        """Raise the errors that can be found before the base is loaded."""
        raise NotImplementedError

    def prepare(self, base: Any, samples: Any, processor: Any) -> Any:
        """The object that `train` trains; for a twig, the TwigVLM with it."""
        raise NotImplementedError

    def train(self, model: Any, data: Any, directory: Path, progress: Any) -> Any:
        """Train the result of `prepare`, with checkpoints in a directory. Returns the object to save."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Stage1(TrainOptions):
    """Grow a twig and distil the base's predictions and attention into it."""

    start: str | None = None
    """Twig to continue with, a directory or a hub id; it keeps its shape. None: a fresh one."""
    twig: TwigConfig = FRESH
    """Shape of a fresh twig."""
    stage1: Stage1Config = field(default_factory=Stage1Config)
    """Settings of the training."""

    def check(self) -> None:
        """Reject a twig to start from that is broken or was asked to have another shape."""
        from twigvlm.checkpoints.twig_files import check
        from twigvlm.errors import TwigVLMError

        if self.start is None:
            return
        if self.twig != FRESH:
            raise TwigVLMError(f"start {self.start!r}: this twig keeps its shape; leave out the options of a fresh one")
        check(self.start)

    def prepare(self, base: Any, samples: Any, processor: Any) -> Any:
        """A fresh twig on the base, or the one to start from."""
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

    def train(self, model: Any, data: Any, directory: Path, progress: Any) -> Any:
        """Distil the base into the twig."""
        from twigvlm.training.distill import train_stage1

        train_stage1(model, data, self.stage1, directory, self.resume, [progress])
        return model


@dataclass(frozen=True, kw_only=True)
class Stage2(TrainOptions):
    """Train the P-Head of a twig from stage 1 by reinforcement; the rest of the twig does not change."""

    start: str
    """Twig from stage 1, a directory or a hub id; it is not modified."""
    stage2: Stage2Config = field(default_factory=Stage2Config)
    """Settings of the training."""

    def check(self) -> None:
        """Reject a twig to start from that is broken or has no P-Head."""
        from twigvlm.checkpoints.twig_files import check
        from twigvlm.errors import TwigVLMError

        if not check(self.start).pruning_head:
            raise TwigVLMError(f"start {self.start!r}: this twig has no P-Head; give a twig from stage 1 that has one")

    def prepare(self, base: Any, samples: Any, processor: Any) -> Any:
        """The twig from stage 1 on the base."""
        from twigvlm.model import TwigVLM

        return TwigVLM.from_pretrained(base, self.start)

    def train(self, model: Any, data: Any, directory: Path, progress: Any) -> Any:
        """Train the P-Head by rewarding its prunings."""
        from twigvlm.training.reinforce import train_stage2

        train_stage2(model, data, self.stage2, directory, self.resume, [progress])
        return model


@dataclass(frozen=True, kw_only=True)
class TuneProjector(TrainOptions):
    """Tune a copy of the base's projector for the tokens that VisionZip merges (VisionZip‡)."""

    makes: ClassVar[str] = "Projector"

    projector: Annotated[ProjectorConfig, tyro.conf.arg(name="")] = field(default_factory=ProjectorConfig)
    """Settings of the training."""

    def check(self) -> None:
        """Do nothing: no errors can be found before the base is loaded."""

    def prepare(self, base: Any, samples: Any, processor: Any) -> Any:
        """The copy of the projector."""
        from twigvlm.base.vlm import BaseVLM
        from twigvlm.training.projector import TunedProjector

        return TunedProjector(BaseVLM(base))

    def train(self, model: Any, data: Any, directory: Path, progress: Any) -> Any:
        """Train the projector on answers about pruned pictures."""
        from twigvlm.training.projector import train_projector

        train_projector(model, data, self.projector, directory, self.resume, [progress])
        return model


@dataclass(frozen=True, kw_only=True)
class CalibrateSchedule(TrainOptions):
    """Fit FitPrune's schedule to the base, on the first questions of conversations with images. No weights are trained."""

    makes: ClassVar[str] = "Schedule"
    continues: ClassVar[bool] = False
    continuation: ClassVar[str] = "run the command again to start over"

    retain: float = 64
    """R̄ that the schedule is fitted to; it is scaled when other budgets are asked for."""
    count: int = 32
    """Conversations that it is fitted on."""

    def check(self) -> None:
        """Reject numbers that no schedule can have, and options that do not apply."""
        from twigvlm.errors import TwigVLMError

        if self.resume:
            raise TwigVLMError("resume: does not apply to a schedule, which is made at once; leave it out")
        if not self.retain > 0:
            raise TwigVLMError(f"retain={self.retain:g}: must be a number of visual tokens, for example 64")
        at_least(1, count=self.count)

    def prepare(self, base: Any, samples: Any, processor: Any) -> Any:
        """The base, whose attention is measured."""
        from twigvlm.base.vlm import BaseVLM

        return BaseVLM(base)

    def train(self, model: Any, data: Any, directory: Path, progress: Any) -> Any:
        """Fit the schedule to the attention that the base pays to the visual tokens of the prompts."""
        from twigvlm.cli.output import busy
        from twigvlm.training.schedule import calibrate_schedule

        with busy("Measuring attention"):
            return calibrate_schedule(model, data, self.retain, self.count)


@dataclass(frozen=True)
class Train:
    """Train a twig on a frozen base, or make what a published method needs. The base is not changed."""

    stage: Annotated[
        Annotated[Stage1, tyro.conf.subcommand("stage1")]
        | Annotated[Stage2, tyro.conf.subcommand("stage2")]
        | Annotated[TuneProjector, tyro.conf.subcommand("visionzip")]
        | Annotated[CalibrateSchedule, tyro.conf.subcommand("fitprune")],
        tyro.conf.OmitSubcommandPrefixes,
    ]

    @property
    def continuation(self) -> str:
        """How to continue after Ctrl-C, for the message."""
        return self.stage.continuation

    def run(self) -> None:
        """Run the chosen stage."""
        self.stage.run()
