"""A request from prompts to answers: prefill -> (draft -> verify -> accept -> commit)* -> stop (Algorithms 1 and 2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from twigvlm.base.prompt import Prompt
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import SpeculationConfig
from twigvlm.engine.context import Context
from twigvlm.engine.prefill import Plan, Prefilled, prefill
from twigvlm.engine.prefix_cache import PrefixCache
from twigvlm.engine.sampling import Noise, Sampling
from twigvlm.engine.timing import Timings, clock_of
from twigvlm.kv.cache import KVCache
from twigvlm.speculation.costs import StepCosts
from twigvlm.speculation.draft import Draft, draft_chain
from twigvlm.speculation.draft_tree import draft_tree
from twigvlm.speculation.policies import AdaptiveTree, FixedTree, Policy
from twigvlm.speculation.tree import walk
from twigvlm.twig.block import Twig


@dataclass(frozen=True)
class Stops:
    """When an answer ends."""

    max_new_tokens: int
    ends: frozenset[int]
    """End-of-sequence ids."""
    criteria: Callable[[Tensor, Any], Tensor] | None
    """Further stopping criteria on (ids [1, n], None) -> bool [1]; asked after every token."""


@dataclass(frozen=True)
class Answers:
    """What a request produced, one entry for each prompt."""

    tokens: list[list[int]]
    kept: Bool[Tensor, "batch tokens"] | None
    """True at the kept visual tokens of the prompts as `Prompt` has them, own tokens first."""
    drafted_lengths: list[list[int]]
    accepted_lengths: list[list[int]]
    timings: Timings


def decode(
    base: BaseVLM,
    twig: Twig,
    inputs: dict[str, Any],
    plan_of: Callable[[Sequence[int]], Plan],
    speculation: SpeculationConfig,
    stops: Stops,
    samplings: Sequence[Sampling],
    emit: Callable[[int], None],
    began: float,
    costs: StepCosts | None = None,
    memory: PrefixCache | None = None,
) -> Answers:
    """Answer a batch of prompts. A row of it gets the answer that it would get alone.

    Args:
        base: the base.
        twig: its twig.
        inputs: arguments of the base's forward, `input_ids` [batch, tokens] among them.
        plan_of: makes the plan of pruning from the prompts' numbers of visual tokens.
        speculation: how to draft.
        stops: when answers end.
        samplings: how the base chooses the tokens of each answer.
        emit: called with each token as it is accepted.
        began: when the request began, by the clock of `clock_of`; vision may have run since.
        costs: of this machine, which `auto` needs.
        memory: of a conversation, whose next question this is (batch 1).

    Raises:
        TwigVLMError: the base refuses the prompt, or a prompt cannot have its budget.
    """
    clock = clock_of(inputs["input_ids"].device)
    timings = Timings()
    prompt = base.prompt(**inputs) if memory is None else memory.open(base, inputs)
    plan = plan_of(prompt.visual_mask.sum(dim=1).tolist())
    noises = [sampling.noise for sampling in samplings]
    context, first = _begin(base, twig, prompt, plan, speculation, stops, noises, costs, memory)
    answers = [
        _Answer(prompt.input_ids[row : row + 1, :length], stops, samplings[row], emit)
        for row, length in enumerate(prompt.lengths)
    ]
    for answer, logits in zip(answers, first.logits, strict=True):
        answer.commit([answer.choices(logits[None])(0, [])])
    timings.prefill = clock() - began

    going = _going_on(answers, context)
    while going:
        start = clock()
        draft = _draft(context, going, stops.max_new_tokens)
        middle = clock()
        verify(context, going, draft)
        stop = clock()
        timings.draft += middle - start
        timings.verify += stop - middle
        going = _going_on(going, context)
    for noise, answer in zip(noises, answers, strict=True):
        if noise is not None:
            noise.close(len(answer.new))
    timings.total = clock() - began
    return Answers(
        [answer.new for answer in answers],
        first.kept,
        [answer.drafted for answer in answers],
        [answer.accepted for answer in answers],
        timings,
    )


def _begin(
    base: BaseVLM,
    twig: Twig,
    prompt: Prompt,
    plan: Plan,
    speculation: SpeculationConfig,
    stops: Stops,
    noises: Sequence[Noise | None],
    costs: StepCosts | None,
    memory: PrefixCache | None,
) -> tuple[Context, Prefilled]:
    """The prompts in the caches, and what their steps share."""
    batch, limit = len(prompt.hidden), stops.max_new_tokens
    cache = None if memory is None else memory.cache
    if cache is None:
        cache = KVCache(twig.last_slot + 1, reserve=min(limit, 512) + speculation.step_tokens)
    masks = base.masks(prompt, rows=speculation.step_tokens + 1, new_tokens=limit)
    first = prefill(base, twig, prompt, plan, masks, cache, memory)
    unseen = first.unseen
    if unseen is not None and batch > 1 and speculation.active:
        unseen.grow()  # at once: rows that finish leave the batch
        unseen = None
    policies = [_policy(speculation, costs, batch, 0 if unseen is None else prompt.lengths[0]) for _ in range(batch)]
    rope = base.inputs_after(prompt, limit)
    pending: list[list[Tensor]] = [[] for _ in range(batch)]
    return (
        Context(base, twig, speculation, policies, stops.ends, masks, cache, rope, list(noises), unseen, pending),
        first,
    )


def _going_on(answers: Sequence["_Answer"], context: Context) -> list["_Answer"]:
    """The answers that have not ended; the rows of the others leave the batch."""
    rows = [row for row, answer in enumerate(answers) if not answer.finished]
    if rows and len(rows) < len(answers):
        context.select(rows)
    return [answers[row] for row in rows]


def _draft(context: Context, going: Sequence["_Answer"], limit: int) -> Draft:
    """What trunk and twig expect after the newest token of each answer; that token alone where nothing is drafted."""
    speculation = context.speculation
    draft_after = draft_tree if speculation.speculate in ("tree", "auto") else draft_chain
    indices = [len(answer.new) - 1 for answer in going]
    rooms = [limit - len(answer.new) - 1 if speculation.active else 0 for answer in going]
    return draft_after(context, [answer.new[-1] for answer in going], indices, rooms)


def verify(context: Context, going: Sequence["_Answer"], draft: Draft) -> None:
    """Layers K+1..L on a draft in one pass; of each row the longest path that the base agrees with stays in the caches."""
    base, trunk = context.base, context.twig.config.trunk_layers
    hidden = base.run_layers(draft.hidden, trunk, base.num_layers, draft.rope, draft.masks, context.cache)
    paths = [
        answer.accept(walk(tree, answer.choices(logits)), len(tree))
        for answer, tree, logits in zip(going, draft.trees, base.logits(hidden), strict=True)
    ]
    draft.keep(context, paths)
    for policy, tree, path in zip(context.policies, draft.trees, paths, strict=True):
        policy.learn(tree, len(path) - 1)


def _policy(speculation: SpeculationConfig, costs: StepCosts | None, rows: int, unseen: int) -> Policy:
    if costs is None:
        return FixedTree(speculation)
    policy = AdaptiveTree(costs, fill=costs.fill * unseen)
    policy.share(rows)
    return policy


class _Answer:
    """One answer as it grows, and whether it has ended."""

    def __init__(self, prompt_ids: Tensor, stops: Stops, sampling: Sampling, emit: Callable[[int], None]) -> None:
        self.new: list[int] = []
        self.drafted: list[int] = []
        self.accepted: list[int] = []
        self.finished = False
        self.stops, self.sampling, self.emit = stops, sampling, emit
        self.prompt_length = prompt_ids.shape[1]
        self.buffer: Tensor | None = None
        if sampling.processors is not None or stops.criteria is not None:  # only those need the ids at each step
            self.buffer = torch.cat((prompt_ids, prompt_ids.new_zeros(1, stops.max_new_tokens)), dim=1)

    def ids(self) -> Tensor | None:
        """Prompt and generated ids, [1, n]."""
        return None if self.buffer is None else self.buffer[:, : self.prompt_length + len(self.new)]

    def choices(self, logits: Tensor) -> Callable[[int, Sequence[int]], int]:
        """The base's choices after the nodes of a draft that begins with the newest token."""
        return self.sampling.choices(logits, self.ids(), len(self.new))

    def accept(self, walked: tuple[list[int], list[int]], nodes: int) -> list[int]:
        """Take up what a walk through a draft of so many nodes found; its path."""
        path, choices = walked
        committed = self.commit(choices)
        self.drafted.append(nodes - 1)
        self.accepted.append(min(len(path) - 1, committed))
        if self.sampling.noise is not None:
            self.sampling.noise.forget(len(self.new))
        return path

    def commit(self, tokens: Sequence[int]) -> int:
        """Append tokens up to and including the one that ends the answer; how many were appended."""
        for count, token in enumerate(tokens, start=1):
            if self.buffer is not None:
                self.buffer[0, self.prompt_length + len(self.new)] = token
            self.new.append(token)
            self.emit(token)
            ended = token in self.stops.ends or len(self.new) >= self.stops.max_new_tokens
            if self.stops.criteria is not None:
                ended = bool(self.stops.criteria(self.ids(), None)[0]) or ended  # type: ignore[arg-type]
            if ended:
                self.finished = True
                return count
        return len(tokens)
