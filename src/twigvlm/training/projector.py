"""VisionZip‡: a copy of the base's projector learns to project merged tokens, by the answers that the base gives after them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from twigvlm.base.packing import valid_mask
from twigvlm.base.vision import VisionModules
from twigvlm.base.vlm import BaseVLM
from twigvlm.checkpoints.twig_files import check_finite
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.files import replacing, writing
from twigvlm.pruning.cut import Choice, Cut, schedule
from twigvlm.pruning.methods.visionzip import VisionZip
from twigvlm.pruning.projector import WEIGHTS
from twigvlm.pruning.run import run_cuts
from twigvlm.pruning.view import CutView, Tokens
from twigvlm.training.checks import first_with_picture
from twigvlm.training.data.dataset import IGNORE, Collator
from twigvlm.training.fit import Run, fit
from twigvlm.training.losses import next_token_loss
from twigvlm.training.options import ProjectorConfig
from twigvlm.training.trainer import TermTrainer
from twigvlm.training.trunk import autocast


class TunedProjector:
    """A base, which stays as it is, and a projector of its own kind that VisionZip uses in place of the base's."""

    def __init__(self, base: BaseVLM) -> None:
        self.base = base
        base.model.requires_grad_(False)
        self.module: nn.Module = copy.deepcopy(VisionModules.of(base.model, base.family.tower).projector)
        self.module.requires_grad_(True)

    def save_pretrained(self, folder: Path) -> None:
        """Write the projector to a directory, for `pruner="visionzip:DIRECTORY"`.

        Raises:
            TwigVLMError: it cannot be written to, or the training has diverged.
        """
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()}
        check_finite(weights, f"{folder}: not written")
        with writing(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS) as temporary:
            save_file(weights, temporary)


class Projecting(nn.Module):
    """The projector as the Trainer sees it: its parameters, and so the checkpoints, are the projector's alone."""

    accepts_loss_kwargs = True  # the Trainer hands in the number of answer tokens that an optimiser step sees

    def __init__(self, tuned: TunedProjector, config: ProjectorConfig) -> None:
        super().__init__()
        self.projector = tuned.module
        self.settings = config  # the Trainer takes a `config` for a model's
        self.pruner = VisionZip(projector=tuned.module)
        self._base = (tuned.base,)  # in a tuple, so that the base is no submodule

    def forward(
        self, labels: Int[Tensor, "batch tokens"], num_items_in_batch: Tensor | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        """Cross-entropy of the answers after the pruned pictures of a batch, which is padded on the right.

        Args:
            labels: ids at answers, -100 elsewhere.
            num_items_in_batch: answer tokens of the optimiser step; None: it has this batch alone.
            inputs: what the base's forward takes.

        Raises:
            TwigVLMError: this base's projector cannot be replaced.
        """
        inputs.pop("attention_mask", None)
        base = self._base[0]
        with torch.no_grad(), base.watch_vision() as vision:
            prompt = base.prompt(vision=vision, **inputs)
        layers, visual = base.num_layers, prompt.visual_mask.sum(dim=1).tolist()
        keep = [self._keep(count, layers) if count else 0 for count in visual]
        tokens = Tokens(prompt.hidden, base.token_inputs(prompt), prompt.visual_mask, prompt.lengths)
        with autocast(base):
            chosen = self.pruner.choose(CutView(base, prompt, 0, tokens, None), keep) if any(keep) else None
            cuts = [(Cut(0, count),) for count in keep]
            left = run_cuts(base, tokens, 0, layers, cuts, lambda *_: cast(Choice, chosen), base.masks())
            assert left.index is not None, "there was a cut"
            valid = valid_mask(left.lengths, left.index.shape[1], left.index.device)
            targets = labels.gather(1, left.index).masked_fill(~valid, IGNORE)[:, 1:]
            answers = targets != IGNORE
            logits = base.logits(left.hidden[:, :-1][answers])
        count = answers.sum() if num_items_in_batch is None else num_items_in_batch
        loss = next_token_loss(logits, targets[answers], count)
        # A batch without a picture has a gradient too.
        return {"loss": loss + 0.0 * sum(one.sum() for one in self.projector.parameters())}

    def _keep(self, visual: int, layers: int) -> int:
        return schedule(self.pruner, min(self.settings.retain, visual), visual, layers)[0].keep


def train_projector(
    tuned: TunedProjector,
    data: Dataset[dict[str, Tensor]],
    config: ProjectorConfig,
    directory: Path,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train the projector in place; arguments, result and errors as in `train_stage1`.

    Raises:
        TwigVLMError: also where the base's projector cannot be tuned, or there is nothing to learn from.
    """

    def make_student(steps: int) -> Projecting:
        module = Projecting(tuned, config)
        _check(module, data)
        return module

    through = tuned.base.model.parameters()
    shape = {"projector": type(tuned.module).__name__}
    run = Run(data, config, directory, resume, callbacks)
    log, _ = fit(tuned.base, tuned.module, shape, through, make_student, TermTrainer, run)
    return log


def _check(module: Projecting, data: Dataset[dict[str, Tensor]]) -> None:
    """Refuse what would train for hours and change nothing; the first sample with a picture tells."""
    base, retain = module._base[0], module.settings.retain
    sample, visual = first_with_picture(base, data)
    if retain >= visual:
        raise TwigVLMError(
            f"retain={retain:g}: VisionZip merges nothing among the {visual} visual tokens of the first sample with a "
            "picture; choose less"
        )
    # These say what is wrong with the budget and the sample, not with the projector.
    module._keep(visual, base.num_layers)
    base.check_context(sample["input_ids"])
    batch = {name: value.to(base.device) for name, value in Collator(pad_token_id=0)([sample]).items()}
    try:
        with torch.no_grad():
            module(**batch)
    except TwigVLMError as error:
        raise TwigVLMError(
            f"this base's projector cannot be tuned for VisionZip ({one_line(error)}); choose another base"
        ) from None
