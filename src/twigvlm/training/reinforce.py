"""Stage 2: the P-Head learns by reinforcement which visual tokens the base answers best with (Eq. 12-16)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigVLM
from twigvlm.pruning.budget import average_kept, solve_keep
from twigvlm.pruning.methods.pruning_head import VisualQuery, log_visual_attention
from twigvlm.training import plackett_luce
from twigvlm.training.checks import first_with_picture
from twigvlm.training.data.turns import answer_length, draw_turns
from twigvlm.training.fit import Run, fit_twig
from twigvlm.training.losses import advantages, attending, attention_loss, policy_loss
from twigvlm.training.options import Stage2Config, spaced
from twigvlm.training.rewards import Case, answer_likelihoods
from twigvlm.training.teacher import resolve_teacher_layers, run_teacher
from twigvlm.training.trainer import CountingTrainer
from twigvlm.training.trunk import TrunkBatch, autocast, run_trunk


def budget_probabilities(count: int, progress: float, beta: float, power: float) -> Float[Tensor, " count"]:
    """P(R_i) ∝ exp(-β(t)·i), β(t) = β_max·progress^p, i ascending with R (Eq. 16): uniform at first, the hardest at the end.

    Args:
        count: number of budgets.
        progress: t/T, 0 to 1.
        beta: β_max.
        power: p.
    """
    return (-beta * progress**power * torch.arange(count, dtype=torch.float64)).softmax(dim=0)


@dataclass(frozen=True)
class Draws:
    """Prunings of one sample."""

    case: Case
    """The question, with the visual tokens that each pruning keeps."""
    log_scores: Float[Tensor, " visual"]
    """Logarithm of the scores s that they are drawn by, with a gradient."""
    actions: Int[Tensor, "group keep"]
    """What was drawn, in order: indices among the visual tokens."""


class Policy(nn.Module):
    """The P-Head as a policy, as the Trainer sees it: checkpoints hold the whole twig, of which the P-Head alone learns.

    Args:
        model: a twig with a P-Head, and its base.
        config: settings.
        steps: T, optimiser steps of the whole training.

    Raises:
        TwigVLMError: the teacher's layers are not above the trunk.
    """

    accepts_loss_kwargs = True  # the Trainer leaves it to the policy to divide by what an optimiser step sees

    def __init__(self, model: TwigVLM, config: Stage2Config, steps: int) -> None:
        super().__init__()
        config = config.resolve()
        self.twig = model.twig
        self.settings = config  # the Trainer takes a `config` for a model's
        self.levels: tuple[float, ...] = config.keep_budgets or config.budgets or ()
        self.steps = steps
        self._model = (model,)  # in a tuple, so that the base is no submodule
        layers, self.trunk = model.base.num_layers, model.twig.config.trunk_layers
        self.shape = layers, *model.twig.config.cut_layers(layers)
        self.teacher_layers = resolve_teacher_layers(config.teacher_layers, layers, self.trunk)

    def keep(self, level: float, visual: int) -> int | None:
        """R of a sample under one of the budgets; None if it cannot have this one.

        Args:
            level: the budget, as R or as R̄.
            visual: M, visual tokens of the sample.
        """
        if self.settings.keep_budgets is not None:
            return int(level) if level <= visual else None
        try:
            return solve_keep(level, visual, *self.shape)
        except TwigVLMError:
            return None

    def forward(
        self,
        labels: Int[Tensor, "batch tokens"],
        step: int,
        part: int,
        num_items_in_batch: Tensor | None = None,
        samples_in_step: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Loss of a batch padded on the right (Eq. 12-15), and figures that show how the learning goes.

        A sample without an image, or one that cannot have the budget that was drawn, teaches nothing. Across the passes and
        processes of an optimiser step, samples weigh equally. In L_AttnKL a pass weighs by its samples that see a picture, as
        in stage 1.

        Args:
            labels: ids at answers, -100 elsewhere. Of each sample's turns one is drawn; the turns before it are context. With a
                `span` so is the answer up to the choice, whose tokens see what that choice keeps.
            step: optimiser steps done.
            part: passes done within this step, those of other processes counted before in turn. Seed, step and part decide all
                that is drawn.
            num_items_in_batch: answer tokens of the optimiser step, which do not count here.
            samples_in_step: samples of the optimiser step; None: it has this batch alone.
            inputs: what the base's forward takes.

        Returns:
            `loss`, with a gradient, and figures by their names in the log; all are scalars.
        """
        base, config = self._model[0].base, self.settings
        choice, generator = self._draw_budget(step), _stream(config.seed, step, part + 1)
        level = self.levels[choice]
        batch = run_trunk(base, self.trunk, inputs)
        query = VisualQuery.at(draw_turns(labels, batch.visual_mask, generator, config.span), batch.visual_mask)
        scores = self._scores(batch, query)
        samples = len(labels) if samples_in_step is None else samples_in_step
        seeing = query.visible.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
        draws = [one for row in seeing if (one := self._draw(row, labels, query, scores, level, generator)) is not None]
        rewarding, terms = self._reward(batch, draws)
        # The scores are for a batch without an image, which has a gradient too.
        loss = rewarding / samples + 0.0 * scores[query.visible].sum()
        terms["taught"] = torch.tensor(len(draws) / len(labels))
        terms["retain" if config.keep_budgets is None else "keep"] = torch.tensor(float(level))
        weight = float(np.interp(choice, (0, max(1, len(self.levels) - 1)), config.gamma))
        if weight:
            teacher = run_teacher(batch, query, self.teacher_layers)
            assert teacher.attention is not None, "asked for"
            divergence = attention_loss(teacher.attention, scores)
            terms["attention_kl"] = divergence.detach()
            loss = loss + weight * divergence * attending(teacher.attention).any(dim=1).sum() / samples
        return {"loss": loss, **terms}

    def _scores(self, batch: TrunkBatch, query: VisualQuery) -> Float[Tensor, "batch queries visual"]:
        """Logarithm of the P-Head's scores, which alone have a gradient."""
        twig = self.twig
        with autocast(batch.base):
            with torch.no_grad():
                last_input = twig.last_input(batch.hidden.float(), batch.inputs, batch.masks)
            return log_visual_attention(twig.layers[-1], last_input, batch.inputs, query, twig.pruning_head)

    def _draw(
        self,
        row: int,
        labels: Int[Tensor, "batch tokens"],
        query: VisualQuery,
        scores: Float[Tensor, "batch queries visual"],
        level: float,
        generator: torch.Generator,
    ) -> Draws | None:
        """Prunings of a sample; None: it cannot have the budget."""
        visible, asking = query.visible[row, 0], int(query.queries[row, 0])
        log_scores, positions = scores[row, 0][visible], query.visual[row][visible]
        keep = self.keep(level, len(positions))
        if keep is None:
            return None
        actions = plackett_luce.sample(log_scores.detach(), self.settings.group, keep, generator)
        length, span = answer_length(labels[row], asking), self.settings.span
        end = asking + (length if span is None else min(length, span))
        return Draws(Case(row, end, labels[row, asking + 1 : end + 1], positions[actions]), log_scores, actions)

    def _reward(self, batch: TrunkBatch, draws: Sequence[Draws]) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss, summed over samples (Eq. 15), and means over them for the log."""
        loss, figures = torch.zeros((), device=batch.hidden.device), defaultdict[str, list[Tensor]](list)
        rewarded = answer_likelihoods(batch, [each.case for each in draws], self.twig.config, self.settings.chunk)
        for each, rewards in zip(draws, rewarded, strict=True):
            relative, keep = advantages(rewards), each.actions.shape[1]
            loss = loss + policy_loss(plackett_luce.log_probability(each.log_scores, each.actions), relative)
            figures["keep"].append(torch.tensor(float(keep)))
            figures["retain"].append(torch.tensor(average_kept(keep, len(each.log_scores), *self.shape)))
            figures["reward"].append(rewards.mean())
            figures["reward_spread"].append(rewards.std())
            figures["advantage_spread"].append(relative.std())
            figures["entropy"].append(plackett_luce.first_draw_entropy(each.log_scores.detach()))
        return loss, {name: torch.stack(values).mean() for name, values in figures.items()}

    def _draw_budget(self, step: int) -> int:
        config = self.settings
        weights = budget_probabilities(len(self.levels), step / self.steps, config.beta, config.power)
        return int(torch.multinomial(weights, 1, generator=_stream(config.seed, step)))


class PolicyTrainer(CountingTrainer):
    """Tells the policy where in the training it is, so that a resumed run draws what an uninterrupted one would have."""

    _progress = (-1, 0)  # optimiser step, and pass within it

    def added_inputs(self) -> dict[str, Any]:
        """Samples of the step at hand, optimiser step, and pass within it."""
        step, part = self._progress
        self._progress = (step, part + 1) if step == self.state.global_step else (self.state.global_step, 0)
        step, part = self._progress
        # Processes take the batches in turn, so that they draw together what one process would draw alone.
        return {**super().added_inputs(), "step": step, "part": part * self.args.world_size + self.args.process_index}


def train_stage2(
    model: TwigVLM,
    data: Dataset[dict[str, Tensor]],
    config: Stage2Config,
    directory: Path,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train the P-Head of a twig from stage 1 in place; the rest of the twig does not change.

    Args:
        model: its P-Head is trained in float32 and ends in the base's number format.
        data: samples, a `ConversationDataset`; those without an image contribute nothing.
        config: settings.
        directory: for checkpoints, which hold the twig, the optimiser and the position in the data.
        resume: continue from the latest checkpoint in `directory`, if there is one.
        callbacks: callbacks of the Trainer, for example to show progress.

    Returns:
        The Trainer's log, with rewards, their spread within a group and that of the advantages (1, or 0 where all rewards are
        equal), the entropy of s, R, R̄ and L_AttnKL.

    Raises:
        TwigVLMError: the twig has no P-Head, no sample has a picture, no budget is both possible for the first one that has and
            smaller than its visual tokens, or an error of stage 1.
    """
    head = model.twig.pruning_head
    if head is None:
        raise TwigVLMError("this twig has no P-Head to train: train one in stage 1 with pruning_head=True first")
    config = config.resolve()

    def make_student(steps: int) -> Policy:
        policy = Policy(model, config, steps)
        _check(policy, data)
        return policy

    model.twig.requires_grad_(False)
    head.requires_grad_(True)
    try:
        return fit_twig(
            model,
            {name: tensor for name, tensor in model.twig.state_dict().items() if not name.startswith("pruning_head.")},
            make_student,
            PolicyTrainer,
            Run(data, config, directory, resume, callbacks),
        )
    finally:
        model.twig.requires_grad_(True)


def _check(policy: Policy, data: Dataset[dict[str, Tensor]]) -> None:
    """Refuse what would train for hours and change nothing; the first sample with a picture tells."""
    config = policy.settings
    _, visual = first_with_picture(policy._model[0].base, data)
    possible = [keep for level in policy.levels if (keep := policy.keep(level, visual)) is not None]
    if all(keep >= visual for keep in possible):
        name = "budgets" if config.keep_budgets is None else "keep_budgets"
        problem = "none prunes" if possible else "none is possible for"
        raise TwigVLMError(
            f"{name}={spaced(policy.levels)}: {problem} the first sample with a picture, of {visual} visual tokens; "
            "choose others"
        )


def _stream(*numbers: int) -> torch.Generator:
    """A random stream for a seed and a moment of the training."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
