"""Stage 1: the shallow model (trunk + twig) learns answers, and from the frozen base its predictions and attention (Eq. 9)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigVLM
from twigvlm.pruning.methods.pruning_head import VisualQuery, log_visual_attention
from twigvlm.training.data.dataset import IGNORE
from twigvlm.training.data.turns import last_prompt_tokens
from twigvlm.training.fit import Run, fit_twig
from twigvlm.training.losses import attending, attention_loss, draft_targets, next_token_loss, prediction_loss
from twigvlm.training.options import Stage1Config
from twigvlm.training.teacher import resolve_teacher_layers, run_teacher
from twigvlm.training.trainer import CountingTrainer
from twigvlm.training.trunk import TrunkBatch, autocast, run_trunk


class Student(nn.Module):
    """The shallow model as the Trainer sees it: its parameters, and so the checkpoints, are the twig's alone.

    The twig holds float32 weights and runs in the base's number format under autocast.

    Args:
        model: the twig with its base.
        config: settings.

    Raises:
        TwigVLMError: a loss needs a P-Head and the twig has none, or the teacher's layers are not above the trunk.
    """

    accepts_loss_kwargs = True  # the Trainer hands in the number of answer tokens that an optimiser step sees

    def __init__(self, model: TwigVLM, config: Stage1Config) -> None:
        super().__init__()
        self.twig = model.twig
        self.settings = config  # the Trainer takes a `config` for a model's
        self._model = (model,)  # in a tuple, so that the base is no submodule
        for name in ("gamma", "gamma_answers"):
            if getattr(config, name) and model.twig.pruning_head is None:
                raise TwigVLMError(
                    f"{name}={getattr(config, name):g}: teaches the P-Head, and this twig has none; "
                    f"grow it with pruning_head=True or set {name}=0"
                )
        model.twig.checkpoint_gradients(config.gradient_checkpointing)
        trunk = model.twig.config.trunk_layers
        self.teacher_layers = resolve_teacher_layers(config.teacher_layers, model.base.num_layers, trunk)

    def forward(
        self,
        labels: Int[Tensor, "batch tokens"],
        num_items_in_batch: Tensor | None = None,
        samples_in_step: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Loss of a batch (Eq. 9), which is padded on the right, and its terms.

        The terms are means over the batch: of answer tokens (Eq. 10), and of turns or their answer tokens (Eq. 11). Across the
        passes and processes of an optimiser step, tokens weigh equally in L_NTP and L_PredKL. In L_AttnKL a pass weighs by its
        samples that see a picture, over all samples of the step, as in stage 2.

        Args:
            labels: ids at answers, -100 elsewhere.
            num_items_in_batch: answer tokens of the optimiser step; None: it has this batch alone.
            samples_in_step: samples of the optimiser step; None: it has this batch alone.
            inputs: what the base's forward takes.

        Returns:
            `loss`, with a gradient, and the terms before their weights, by their names in the log; all are scalars.
        """
        base, twig, config = self._model[0].base, self.twig, self.settings
        batch = run_trunk(base, twig.config.trunk_layers, inputs)
        answers, ends = labels[:, 1:] != IGNORE, last_prompt_tokens(labels)
        query = None
        if config.gamma or config.gamma_answers:
            asking = torch.nn.functional.pad(answers, (0, 1)) if config.gamma_answers else ends
            query = VisualQuery.at(asking, batch.visual_mask)
        teacher = run_teacher(batch, query, self.teacher_layers, answers if config.alpha else None)
        logits, scores = self._run_twig(batch, answers, query)
        targets = draft_targets(labels[:, 1:][answers], twig.draft_token_ids, base.vocabulary)
        count = answers.sum() if num_items_in_batch is None else num_items_in_batch
        of_tokens = answers.sum() / count
        loss = next_token_loss(logits, targets, count)
        terms = {"next_token": loss.detach() / of_tokens}
        if teacher.logits is not None:
            target = teacher.logits if twig.draft_token_ids is None else teacher.logits[:, twig.draft_token_ids]
            terms["prediction_kl"] = prediction_loss(target, logits, config.temperature, config.clip).mean()
            loss = loss + of_tokens * config.alpha * terms["prediction_kl"]
        if teacher.attention is not None and scores is not None and query is not None:
            at_ends = ends.gather(1, query.queries)
            samples = len(labels) if samples_in_step is None else samples_in_step
            for name, weight, among in (
                ("attention_kl", config.gamma, at_ends),
                ("answer_attention_kl", config.gamma_answers, ~at_ends),
            ):
                if weight:
                    terms[name] = attention_loss(teacher.attention, scores, among)
                    of_samples = attending(teacher.attention, among).any(dim=1).sum() / samples
                    loss = loss + of_samples * weight * terms[name]
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def _run_twig(
        self, batch: TrunkBatch, answers: Bool[Tensor, "batch positions"], query: VisualQuery | None
    ) -> tuple[Float[Tensor, "answers draft_vocabulary"], Float[Tensor, "batch queries visual"] | None]:
        """The student's logits of the answers, and where there is a query the logarithm of the P-Head's scores."""
        twig, scores = self.twig, None
        with autocast(batch.base):
            last_input, states = twig.forward_with_last_input(batch.hidden.float(), batch.inputs, batch.masks)
            logits = twig.logits(states[:, :-1][answers])
            if query is not None:
                scores = log_visual_attention(twig.layers[-1], last_input, batch.inputs, query, twig.pruning_head)
        return logits, scores


def train_stage1(
    model: TwigVLM,
    data: Dataset[dict[str, Tensor]],
    config: Stage1Config,
    directory: Path,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train the twig in place.

    Args:
        model: its twig is trained in float32 and ends in the base's number format; its base stays as it is.
        data: samples, a `ConversationDataset`.
        config: settings.
        directory: for checkpoints, which hold the twig, the optimiser and the position in the data.
        resume: continue from the latest checkpoint in `directory`, if there is one.
        callbacks: callbacks of the Trainer, for example to show progress.

    Returns:
        The Trainer's log, with every loss term.

    Raises:
        TwigVLMError: the settings do not fit the model, the data or the checkpoint; `directory` is full, read-only or in use by
            another run; or the training diverges.
    """
    if model.twig.pruning_head is not None:
        model.twig.pruning_head.requires_grad_(config.gamma + config.gamma_answers > 0)
    try:
        run = Run(data, config, directory, resume, callbacks)
        return fit_twig(model, {}, lambda steps: Student(model, config), CountingTrainer, run)
    finally:
        model.twig.checkpoint_gradients(False)
        model.twig.requires_grad_(True)
