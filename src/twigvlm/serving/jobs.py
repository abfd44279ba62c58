"""A request on its way through the engine, and the events that report on it. No HTTP and no threads here."""

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
    """Numbers of tokens of one answer so far."""

    drafted: int
    """Drafted tokens."""
    visual: int
    """Visual tokens of the prompt."""
    kept: int
    """Visual tokens that passed the first cut."""
    average: float
    """R̄: visual tokens that enter a layer, averaged over all layers; includes the ranking in scout mode."""
    cached: int
    """Prompt tokens that were not computed again, because an earlier request began with them."""


@dataclass(frozen=True)
class Tokens:
    """New tokens of one answer."""

    choice: int
    tokens: list[tuple[int, bool]]
    """(token id, whether it was drafted)"""
    finished: bool
    counts: Counts
    kept: list[int] | None = None
    """Indices, among the visual tokens, of those kept from now on; None: unchanged, or details were not asked for."""


@dataclass(frozen=True)
class Failed:
    """The request has failed; no further event follows."""

    error: RequestError


JobEvent = Tokens | Failed


@dataclass(eq=False)
class Choice:
    """One answer of a job. Generated again after a failed step, it reports only tokens that it did not report before."""

    index: int
    seed: int | None
    """Seed of the sampling; None: greedy."""
    row: Row | None = None
    grammar: GrammarProcessor | None = None
    key: tuple[str, int] | None = None
    """The way to draft of the engine that holds the row, and the row's id there; None: no engine holds it."""
    steps: int = 0
    """Steps of the row that have been reported."""
    position: int = 0
    """Tokens of the row that have been reported, repeated ones included."""
    given: int = 0
    """Tokens that were passed on to the client."""
    looks: int = -1
    """How many later choices of visual tokens were passed on; -1: not even the first choice."""
    ended: bool = False
    counts: Counts | None = None


@dataclass(eq=False)
class Job:
    """A request that is ready for an engine.

    Args:
        inputs: the processor's outputs for the prompt.
        options: arguments of `TwigVLM.generate`.
        speculate: how to draft.
        seeds: seed of the sampling of each answer; None: greedy.
        listen: called by the worker's thread with each event; must return at once.
        grammar: grammar that the answers must follow; None: free text.
        details: whether events report which visual tokens are kept.
        arrived: when the request arrived, in seconds of `time.monotonic`.
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
    """Identifies the pictures of the prompt, for the prefix cache."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the picture's patches, where details are asked for and there is one picture."""
    suspect: bool = False
    """Whether a step with this job failed: it is then generated alone, so that it cannot fail other jobs again."""
    started: bool = False
    """Whether the first token has been reported."""
    failed: bool = False
    """Whether its failure has been reported."""
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
        """Size of the inputs, in bytes, without anything that the engine computes from them."""
        return sum(value.numel() * value.element_size() for value in self.inputs.values() if torch.is_tensor(value))

    @property
    def ended(self) -> bool:
        """Whether all answers have ended."""
        return all(choice.ended for choice in self.choices)

    def restart(self) -> None:
        """Drop the rows, so that the answers are generated again from the beginning."""
        for choice in self.choices:
            choice.row = choice.key = choice.counts = None
            choice.steps = choice.position = 0

    def row_options(self, choice: Choice, device: torch.device, memory: PrefixCache | None) -> dict[str, Any]:
        """Arguments of an engine's `add` for one of the answers.

        Args:
            choice: the answer, one of this job's.
            device: device of the model.
            memory: prefix cache for the prompt; None: its states are not kept.
        """
        options = {**self.options, "memory": memory, "pictures": self.pictures}
        if choice.seed is not None:
            options["generator"] = torch.Generator(device).manual_seed(choice.seed)
        if self.grammar is not None:
            choice.grammar = self.grammar.processor(self.prompt_tokens)
            options["logits_processor"] = [choice.grammar]
        return options

    def tell(self, choice: Choice, tokens: Sequence[int], finished: bool, layers: int) -> Tokens:
        """The event that reports a step's new tokens, without those that were passed on before a restart.

        Args:
            choice: the answer, one of this job's.
            tokens: all tokens of the step.
            finished: whether they end the answer.
            layers: L, number of layers of the base.
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
    """Indices, among the visual tokens, of those that a row keeps now, ascending."""
    mask = row.prompt.visual_mask[row.index]
    if row.looks:
        kept = torch.zeros_like(mask)
        kept[row.looks[-1].kept] = True
    else:
        kept = mask if row.kept is None else row.kept
    return [int(index) for index in kept[mask].nonzero()[:, 0].tolist()]


def _counts(row: Row, layers: int) -> Counts:
    """Counts of a row after its prefill, before any drafted tokens are added.

    Args:
        row: the row.
        layers: L, number of layers of the base.
    """
    visual = row.visual
    kept = visual if row.kept is None else int(row.kept.sum())
    return Counts(0, visual, kept, average_of(row.pruner, row.cuts, visual, layers), row.cached)
