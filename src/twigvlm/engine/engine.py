"""The engine: rows join while others decode, and leave when they end (continuous batching)."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from twigvlm.base.vlm import BaseVLM
from twigvlm.config import PruningConfig, at_least
from twigvlm.engine.memory import free_bytes, refocus_bytes, row_bytes, together_bytes
from twigvlm.engine.row import Row, extend_all
from twigvlm.engine.runner import Runner, Step
from twigvlm.errors import RequestRefused, TwigVLMError
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.build import build_pruner
from twigvlm.pruning.cut import Need, Pruner, schedule
from twigvlm.pruning.refocus import check_refocus
from twigvlm.timing import Timings, clock_of


@dataclass(frozen=True)
class Event:
    """New tokens of one request from one step."""

    id: int
    tokens: list[int]
    """New token ids, in order."""
    finished: bool
    """Whether the answer is complete."""


class Engine:
    """Answers several requests at once; each gets the answer that it would get alone (in float32). For one thread.

    Args:
        runner: runs the steps on the device; it belongs to this engine alone.
        make_row: turns the arguments of `add` into a row.
        max_rows: largest number of rows that decode together; None: as many as memory allows.
        max_bytes: memory for keys and values; None: nine tenths of what is free on an accelerator when the engine is
            created, or half of the machine's memory.
        timings: receives the seconds spent; None: nothing is timed, and the device is not synchronised.
    """

    def __init__(
        self,
        runner: Runner,
        make_row: Callable[..., Row] | None = None,
        max_rows: int | None = None,
        max_bytes: int | None = None,
        timings: Timings | None = None,
    ) -> None:
        limits = {"max_rows": max_rows, "max_bytes": max_bytes}
        at_least(1, **{name: value for name, value in limits.items() if value is not None})
        self.runner, self.make_row, self.max_rows, self.timings = runner, make_row, max_rows, timings
        self.base: BaseVLM = runner.batch.base
        self.max_bytes = free_bytes(self.base.device) if max_bytes is None else max_bytes
        self.waiting: deque[Row] = deque()
        self._ids = count()
        self._events: deque[Event] = deque()
        """Not yet returned: a step that raises leaves them to the next one, and `stream` hands them on one by one."""
        self._broken = False
        self._clock = None if timings is None else clock_of(self.base.device)

    def add(self, inputs: Any, **options: Any) -> int:
        """Queue a request and return its id.

        Args:
            inputs: the processor's outputs for one prompt.
            options: arguments of `TwigVLM.generate`, except for those of speculation, which are the engine's.

        Raises:
            TwigVLMError: an error of `generate`; nothing is queued then.
        """
        if not isinstance(inputs, Mapping):
            raise TwigVLMError(
                f"inputs: is {type(inputs).__name__}; pass the processor's outputs, with input_ids and the rest"
            )
        if self.make_row is None:
            raise TwigVLMError("this engine takes only rows: make one with TwigVLM.engine()")
        memory, generator, here = options.get("memory"), options.get("generator"), (*self.waiting, *self.active)
        if memory is not None and any(row.prefix is memory for row in here):
            raise TwigVLMError("memory: another request still uses this prefix cache; give each request its own")
        if generator is not None and any(row.noise is not None and row.noise.draws_from(generator) for row in here):
            raise TwigVLMError(
                "generator: another request still draws from it, so that neither would get the answer that it gets alone; "
                "give each request its own"
            )
        return self.submit([self.make_row(inputs, **options)])[0]

    def submit(self, rows: Sequence[Row]) -> list[int]:
        """Queue the rows of one request and return their ids.

        Raises:
            TwigVLMError: a prompt that is to be pruned ends with a visual token, or the engine failed within an earlier step.
        """
        self._check_whole()
        if any(row.pruner is not None and bool(row.prompt.visual_mask[row.index, row.length - 1]) for row in rows):
            raise TwigVLMError("the prompt ends with a visual token: put text behind it, or leave pruning out")
        for row in rows:
            row.id = next(self._ids)
            row.cache_bytes = row_bytes(self.runner.batch, row, self.runner.policy.uses_twig)
            row.refocus_bytes = refocus_bytes(self.base, row)
            self.waiting.append(row)
        return [row.id for row in rows]

    def fork(
        self, id: int, pruner: Pruner | str | None, retain: float | None = None, refocus: float | None = None
    ) -> int:
        """Queue a second answer to the prompt of a waiting request, with another pruning, and return its id.

        The vision tower runs once for both, and so do trunk, twig and scorers, unless one of the pruners cuts before layer K or
        ranks by the attention of the layer before a cut. All other options are those of the request.

        Args:
            id: id of a waiting request.
            pruner: pruning method of the new answer, or its name; None: no pruning.
            retain: R̄; None: the pruner sets its own cuts.
            refocus: τ of the new answer; None: its visual tokens stay the same.

        Raises:
            TwigVLMError: there is no such waiting request, it is sampled or has processors or criteria of its own, the budget is
                impossible for the prompt, or the pruner cannot choose again or was not shown the picture.
        """
        if pruner is None and retain is not None:
            raise TwigVLMError(f"retain={retain:g}: needs a pruner; give the pruning method of the new answer too")
        twig, layers = self.runner.batch.twig, self.base.num_layers
        options = PruningConfig(retain, pruner=pruner) if pruner == "twig" else PruningConfig()
        pruner = build_pruner(options, twig, layers, pruner=pruner)
        source = next((row for row in self.waiting if row.id == id), None)
        if source is None:
            raise TwigVLMError(f"request {id}: is not waiting; fork it before the next step")
        if source.noise is not None or len(source.request.rows) > 1:
            raise TwigVLMError(f"request {id}: is sampled, or asks for several answers; add it as a new request")
        of_its_own = {"logits processors": source.request.processors, "stopping criteria": source.request.criteria}
        for kind in (kind for kind, functions in of_its_own.items() if functions is not None and functions.has_state):
            raise TwigVLMError(f"request {id}: has {kind} that two answers cannot share; add it as a new request")
        if pruner is not None and Need.VISION in pruner.needs and source.prompt.vision is None:
            raise TwigVLMError(
                f"request {id}: the pruner of the fork ranks by the vision tower; add the request with that pruner, and fork it "
                "to the others"
            )
        if refocus is not None:
            check_refocus(refocus, pruner, self.base, twig)
        if source.prefix is None:
            source.prefix = PrefixCache()
        cuts = () if pruner is None else schedule(pruner, retain, source.visual, layers)
        request = replace(source.request, rows=[])
        fork = replace(
            source, request=request, pruner=pruner if cuts else None, cuts=cuts, refocus=refocus,
            tokens=[], drafted=[], accepted=[], looks=[],
        )  # fmt: skip
        request.rows.append(fork)
        return self.submit([fork])[0]

    def cancel(self, id: int) -> None:
        """Cancel a waiting or decoding request; it gets no more events.

        Raises:
            TwigVLMError: there is no such request, or it has ended.
        """
        row = next((row for row in (*self.waiting, *self.active) if row.id == id), None)
        unread = any(event.id == id for event in self._events)
        if row is None and not unread:  # otherwise it has ended, but who cancels it cannot know
            raise TwigVLMError(f"request {id}: does not exist, or has ended; use the id of a running request")
        if row in self.active:
            self._leave(self.active.index(row))  # first: where memory runs out, nothing has changed
        elif row is not None:
            self.waiting.remove(row)
        if row is not None:
            row.end()
        self._events = deque(event for event in self._events if event.id != id)

    @property
    def active(self) -> list[Row]:
        """The rows that are being decoded; row i is row i of the cache."""
        return self.runner.rows

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or decoding, or has events that were not returned yet."""
        return not self._broken and bool(self.waiting or self.active or self._events)

    def step(self) -> list[Event]:
        """Admit the waiting requests that fit, then draft, verify and commit once for all rows.

        Raises:
            RequestRefused: prompts cannot be admitted. It has the ids of their requests, which are cancelled; all others continue
                with the next step, which also returns their events of this one. Other errors of a prefill, of a scorer or where
                memory runs out, are raised as they are, with the ids as `requests` too. After an error while tokens are decoded,
                for example of a logits processor, the caches hold half a step: the engine refuses to go on.
        """
        self._check_whole()
        with torch.inference_mode():
            while group := self._next_group():
                self._events += self._whole(self._extend, group, self._prefill(group))
            if self.active:
                self._events += self._whole(self._decode)
        events = list(self._events)
        self._events.clear()
        return events

    def _whole(self, run: Callable[..., list[Event]], *arguments: Any) -> list[Event]:
        """Run part of a step. If it raises, the engine is marked broken, because the caches may be half updated."""
        self._broken = True
        try:
            events = run(*arguments)
        except BaseException:
            _forget(self.active)
            raise
        self._broken = False
        return events

    def _check_whole(self) -> None:
        if self._broken:
            raise TwigVLMError("engine: failed within an earlier step; make another with TwigVLM.engine()")

    def stream(self) -> Iterator[Event]:
        """Run steps until every request has ended; raises what `step` raises. Requests may be added and cancelled meanwhile, and
        the loop may be left and begun again."""
        while self.busy:
            if not self._events:
                events = self.step()
                self._events.extend(events)
            while self._events:
                yield self._events.popleft()

    def _next_group(self) -> list[Row]:
        """Waiting rows, in their order, that one prefill takes up: those that fit and share prompts and cuts with the first."""
        group: list[Row] = []
        cache = self.runner.batch.cache
        for row in self.waiting:
            first = group[0] if group else row
            together = row.prompt is first.prompt and row.pruner is first.pruner and row.prefix is first.prefix is None
            if group and not (together and [cut.layer for cut in row.cuts] == [cut.layer for cut in first.cuts]):
                break
            number, used = len(self.active) + len(group) + 1, together_bytes(cache, [*self.active, *group, row])
            fits = used <= self.max_bytes and (self.max_rows is None or number <= self.max_rows)
            locked = bool(group) and row.request.lockstep and row.request is first.request
            if not fits and number > 1 and not locked:
                break
            group.append(row)
        return group

    def _prefill(self, group: list[Row]) -> Step:
        start = self._now()
        for _ in group:
            self.waiting.popleft()
        try:
            step = self.runner.prefill(group)
        except BaseException as error:
            for row in group:
                row.end()
            _forget(group)
            requests = tuple(row.id for row in group)
            if isinstance(error, TwigVLMError):
                raise RequestRefused(str(error), requests) from error
            error.requests = requests  # type: ignore[attr-defined]
            raise
        if self.timings is not None:
            self.timings.prefill += self._now() - start
        return step

    def _decode(self) -> list[Event]:
        start = self._now()
        draft = self.runner.draft()
        middle = self._now()
        step = self.runner.verify(draft)
        if self.timings is not None:
            self.timings.draft += middle - start
            self.timings.verify += self._now() - middle
        return self._extend(list(self.active), step)

    def _extend(self, rows: Sequence[Row], step: Step) -> list[Event]:
        """Give rows their new tokens; those that end leave."""
        taken = extend_all(rows, step.tokens)
        for row, new, tokens, drafted in zip(rows, taken, step.tokens, step.drafted, strict=True):
            row.drafted.append(drafted)
            row.accepted.append(min(len(tokens) - 1, len(new)))
        for index in reversed(range(len(self.active))):
            if self.active[index].finished:
                self._leave(index)
        return [Event(row.id, new, row.finished) for row, new in zip(rows, taken, strict=True)]

    def _leave(self, index: int) -> None:
        with torch.inference_mode():
            self.runner.leave(index)

    def _now(self) -> float:
        return 0.0 if self._clock is None else self._clock()


def _forget(rows: Sequence[Row]) -> None:
    """Empty the prefix caches that may hold half a prompt."""
    for row in rows:
        if row.prefix is not None:
            row.prefix.forget()
