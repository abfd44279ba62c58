"""A request on its way through the engine, and what it is told: no HTTP, no threads."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from twigvlm.engine.row import Row
from twigvlm.kv.prefix_cache import Pictures, PrefixCache
from twigvlm.pruning.cut import average_of
from twigvlm.serving.errors import RequestError
from twigvlm.serving.grammar import Grammar, GrammarProcessor


@dataclass(frozen=True)
class Counts:
    """What an answer has taken so far."""

    drafted: int
    """Tokens that the twig drafted."""
    visual: int
    """Visual tokens of the prompt."""
    kept: int
    """Visual tokens that passed the first cut."""
    average: float
    """R̄, average over all layers of the visual tokens that enter a layer, those of the ranking in scout mode included."""
    cached: int
    """Tokens of the prompt whose trunk states an earlier request had left."""


@dataclass(frozen=True)
class Tokens:
    """New tokens of one answer."""

    choice: int
    tokens: list[tuple[int, bool]]
    """Ids, and whether the twig drafted them."""
    finished: bool
    counts: Counts
    kept: list[int] | None = None
    """The visual tokens that are kept from now on, counted from the first one; None: as before, or nobody asked."""


@dataclass(frozen=True)
class Failed:
    """The request has failed; nothing more comes."""

    error: RequestError


JobEvent = Tokens | Failed


@dataclass(eq=False)
class Choice:
    """One answer of a job. A row that is generated again, after a step failed, gives out what is new alone."""

    index: int
    seed: int | None
    """Seed of the sampling; None: greedy."""
    row: Row | None = None
    grammar: GrammarProcessor | None = None
    key: tuple[str, int] | None = None
    """The engine that the row is in, and its id there; None: in none."""
    steps: int = 0
    """Steps of the row whose tokens have come."""
    position: int = 0
    """Tokens of the row that have come."""
    given: int = 0
    """Tokens given out."""
    looks: int = -1
    """Choices of visual tokens given out, less the first one."""
    ended: bool = False
    counts: Counts | None = None


@dataclass(eq=False)
class Job:
    """A request that is ready for an engine.

    Args:
        inputs: the processor's outputs for the prompt.
        options: of `TwigVLM.generate`.
        speculate: how to draft.
        seeds: one answer each; None: greedy.
        listen: called by the worker's thread with each event; must return at once.
        grammar: that the answers follow; None: none.
        details: whether to tell which visual tokens are kept.
        arrived: by the monotonic clock.
    """

    inputs: dict[str, Any]
    options: dict[str, Any]
    speculate: str
    seeds: Sequence[int | None]
    listen: Callable[[JobEvent], None]
    grammar: Grammar | None = None
    details: bool = False
    arrived: float = field(default_factory=time.monotonic)
    pictures: Pictures = field(init=False)
    """What tells the prompt's pictures from others."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the picture's patches, where details are asked for and there is one picture."""
    suspect: bool = False
    """Whether a step with this job failed: it then runs alone, so that it can spoil no other one."""
    started: bool = False
    """Whether a token has come."""
    failed: bool = False
    """Whether it was told that it has failed."""
    choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pictures = Pictures(self.inputs)
        self.choices = [Choice(index, seed) for index, seed in enumerate(self.seeds)]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def bytes(self) -> int:
        """Bytes of the inputs, without what the engine makes of them."""
        return sum(value.numel() * value.element_size() for value in self.inputs.values() if torch.is_tensor(value))

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return all(choice.ended for choice in self.choices)

    def restart(self) -> None:
        """Forget the rows; the answers are generated again from the beginning."""
        for choice in self.choices:
            choice.row = choice.key = choice.counts = None
            choice.steps = choice.position = 0

    def row_options(self, choice: Choice, device: torch.device, memory: PrefixCache | None) -> dict[str, Any]:
        """Arguments of an engine's `add` for one of the answers.

        Args:
            choice: of this job.
            device: of the model.
            memory: prefix cache for the prompt; None: nothing of it is kept.
        """
        options = {**self.options, "memory": memory, "pictures": self.pictures}
        if choice.seed is not None:
            options["generator"] = torch.Generator(device).manual_seed(choice.seed)
        if self.grammar is not None:
            choice.grammar = self.grammar.processor(self.prompt_tokens)
            options["logits_processor"] = [choice.grammar]
        return options

    def tell(self, choice: Choice, tokens: Sequence[int], finished: bool, layers: int) -> Tokens:
        """The event of a step's new tokens; those that were given out before are left out.

        Args:
            choice: of this job.
            tokens: of the step.
            finished: whether they end the answer.
            layers: L of the base.
        """
        row = choice.row
        assert row is not None, "it is in an engine"
        accepted = row.accepted[choice.steps]
        counts = _counts(row, layers) if choice.counts is None else choice.counts
        choice.counts = replace(counts, drafted=counts.drafted + row.drafted[choice.steps])
        skip = max(0, choice.given - choice.position)
        new = [(token, index < accepted) for index, token in enumerate(tokens)][skip:]
        choice.steps, choice.position = choice.steps + 1, choice.position + len(tokens)
        choice.given = max(choice.given, choice.position)
        choice.ended = finished
        kept = None
        if self.details and len(row.looks) > choice.looks:
            kept, choice.looks = kept_visual(row), len(row.looks)
        return Tokens(choice.index, new, finished, choice.counts, kept)


def kept_visual(row: Row) -> list[int]:
    """Which visual tokens a row keeps now, counted from the first one, ascending."""
    mask = row.prompt.visual_mask[row.index]
    if row.looks:
        kept = torch.zeros_like(mask)
        kept[row.looks[-1].kept] = True
    else:
        kept = mask if row.kept is None else row.kept
    return [int(index) for index in kept[mask].nonzero()[:, 0].tolist()]


def _counts(row: Row, layers: int) -> Counts:
    """What a row has kept after its prefill, before its drafts are counted.

    Args:
        row: of an engine.
        layers: L of the base.
    """
    visual = row.visual
    kept = visual if row.kept is None else int(row.kept.sum())
    return Counts(0, visual, kept, average_of(row.pruner, row.cuts, visual, layers), row.cached)
