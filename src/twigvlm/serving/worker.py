"""The worker: one thread that owns the engines. A job that fails or is cancelled does not affect the others."""

import logging
import time
from collections import deque
from threading import Condition, Thread

import torch

from twigvlm.engine.engine import Engine
from twigvlm.engine.memory import free_bytes
from twigvlm.errors import is_out_of_memory
from twigvlm.heap import give_back_freed_memory
from twigvlm.kv.prefix_pool import PrefixPool
from twigvlm.model import TwigVLM
from twigvlm.serving.failures import request_error, shutting_down, too_late, why_given_up
from twigvlm.serving.jobs import Choice, Failed, Job, JobEvent
from twigvlm.serving.limits import Limits
from twigvlm.serving.metrics import Metrics

_log = logging.getLogger(__name__)
_ADMITTED = 2
"""Largest number of jobs that start between two steps, so that answers in progress are not held up for long."""
_TRIMMED = 64
"""Freed memory is given back to the system after this many jobs; it takes hundredths of a second."""
_LAST_STEP = 2.0
"""Seconds to wait for the current step when the worker stops. A step cannot be interrupted; a prefill may take far longer."""


class Worker:
    """Generates the answers of jobs, several at once.

    An engine drafts in one way for all of its rows. The worker makes an engine for each way that is asked for; they take turns.

    Args:
        model: the model that answers.
        limits: limits of rows, waiting time and total time.
        metrics: metrics to update.
        max_bytes: memory for keys and values of all engines together, in bytes; None: as much as is free at the start.
    """

    def __init__(self, model: TwigVLM, limits: Limits, metrics: Metrics, max_bytes: int | None = None) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._changed = Condition()
        self._waiting: deque[Job] = deque()
        self._cancelled: list[tuple[Job, int | None]] = []
        self._draining = self._stopped = False
        # Only the thread touches what follows.
        self._engines: dict[str, Engine] = {}
        self._choices: dict[tuple[str, int], tuple[Job, Choice]] = {}
        self._admitted = 0
        self._admitting: Job | None = None  # neither waiting any more nor with rows yet
        self._max_bytes = free_bytes(model.base.device) if max_bytes is None else max_bytes
        self._prefixes = PrefixPool(min(limits.prefix_bytes, self._max_bytes // 4))
        self._threads = torch.get_num_threads()
        self._thread = Thread(target=self._run, name="twigvlm-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Its events are passed to `job.listen`.

        Raises:
            RequestError: the server is shutting down.
        """
        with self._changed:
            if self._draining:
                raise shutting_down()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job, choice: int | None = None) -> None:
        """Cancel a job, or the answer of index `choice`. Does nothing if it has ended; no event reports it."""
        with self._changed:
            self._cancelled.append((job, choice))
            self._changed.notify()

    def drain(self) -> None:
        """Refuse waiting and new jobs; jobs in progress continue."""
        with self._changed:
            self._draining = True
            refused = [job for job in self._waiting if not job.suspect]  # those that start over are under way
            self._waiting = deque(job for job in self._waiting if job.suspect)
            self._changed.notify()
        for job in refused:
            self._tell(job, Failed(shutting_down()))

    def stop(self, seconds: float = 0.0) -> None:
        """Stop the thread, without waiting for its current step if that takes long.

        Args:
            seconds: time that jobs in progress have left before they fail.
        """
        self.drain()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (self._choices or self._waiting or self._admitting):
            time.sleep(0.02)
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._tell_the_end()
        self._thread.join(_LAST_STEP)

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused."""
        return self._draining

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # a number of each thread's own
        while self._next_turn():
            try:
                self._turn()
            except Exception as error:  # what no other handler foresaw must not end the thread
                _log.exception("the worker failed; all answers under way are given up")
                jobs = self._jobs()
                self._prefixes.clear()
                self._engines.clear()  # first: they may be broken, and rows that fail would leave them one by one
                for job in jobs:
                    self._fail(job, error)
                self._choices.clear()
        self._tell_the_end()

    def _tell_the_end(self) -> None:
        """Report to all jobs, running or waiting, that the server shuts down. Any thread may call this."""
        for job in filter(None, (*self._jobs(), self._admitting, *list(self._waiting))):
            self._tell(job, Failed(shutting_down()))

    def _next_turn(self) -> bool:
        """Wait for work. Returns False when the thread has to end."""
        with self._changed:
            while not (self._stopped or self._waiting or self._cancelled or self._choices):
                self._metrics.set("twigvlm_rows", 0)
                self._changed.wait()
            return not self._stopped

    def _turn(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
        for job, choice in cancelled:
            self._give_up(job, choice)
        self._end_late_jobs()
        for _ in range(_ADMITTED):
            if (next_job := self._next_job()) is None:
                break
            self._admit(next_job)
            self._admitting, self._admitted = None, self._admitted + 1
            if self._admitted % _TRIMMED == 0:
                give_back_freed_memory()
        self._metrics.set("twigvlm_rows", len(self._choices))
        for way in list(self._engines):
            if self._engines[way].busy:
                self._step(way)

    def _jobs(self) -> list[Job]:
        """Jobs with rows."""
        return list(dict.fromkeys(job for job, _ in list(self._choices.values())))  # copied: see _tell_the_end

    def _next_job(self) -> Job | None:
        """The first waiting job, if there is room for it."""
        with self._changed:
            if not self._waiting:
                return None
            job, rows = self._waiting[0], len(self._choices)
            alone = job.suspect or any(other.suspect for other in self._jobs())
            if rows and (alone or rows + len(job.choices) > self._limits.max_rows):
                return None
            self._admitting = self._waiting.popleft()
            return self._admitting

    def _admit(self, job: Job) -> None:
        """Add the job's rows to the engine that drafts in the way that the job asks for."""
        way = job.speculate
        try:
            engine = self._engines.get(way)
            if engine is None:
                engine = self._engines[way] = self._model.engine(max_bytes=self._max_bytes, speculate=way)
            assert engine.make_row is not None
            open_choices = [choice for choice in job.choices if not choice.ended]
            memory = self._prefixes.take(job.inputs["input_ids"], job.pictures, shared=len(open_choices) > 1)
            for choice in open_choices:
                choice.row = engine.make_row(job.inputs, **job.row_options(choice, self._model.device, memory))
            for choice in open_choices:
                choice.key = way, engine.submit([choice.row])[0]  # type: ignore[list-item]
                self._choices[choice.key] = job, choice
        except Exception as error:
            self._fail(job, error)

    def _step(self, way: str) -> None:
        engine = self._engines[way]
        others = sum(other.runner.batch.cache.allocated() for other in self._engines.values() if other is not engine)
        engine.max_bytes = self._max_bytes - others - self._prefixes.bytes
        try:
            events = engine.step()
        except Exception as error:
            self._after_failure(way, error)
            return
        for event in events:
            if (found := self._choices.get((way, event.id))) is None:
                continue
            job, choice = found
            if choice.grammar is not None and choice.grammar.error is not None:
                self._fail(job, choice.grammar.error)
                continue
            told = job.tell(choice, event.tokens, event.finished, self._model.base.num_layers)
            self._count(job, choice, len(told.tokens))
            self._tell(job, told)
            if event.finished:  # last, so that a job that fails on its way here is told so
                self._choices.pop((way, event.id), None)

    def _count(self, job: Job, choice: Choice, new: int) -> None:
        metrics, row, counts = self._metrics, choice.row, choice.counts
        assert row is not None, "it has got tokens"
        assert counts is not None, "they have been told"
        metrics.add("twigvlm_generated_tokens_total", new)
        metrics.add("twigvlm_steps_total")
        metrics.add("twigvlm_drafted_tokens_total", row.drafted[choice.steps - 1])
        metrics.add("twigvlm_accepted_tokens_total", row.accepted[choice.steps - 1])
        prefix, row.prefix = row.prefix, None  # the prefill has ended
        if prefix is not None and prefix.holds(row.prompt):
            self._prefixes.keep(prefix, job.pictures)
        if not job.started:
            job.started = True
            metrics.observe("twigvlm_time_to_first_token_seconds", time.monotonic() - job.arrived)
            of_prompt = {"prompt": job.prompt_tokens, "cached_prompt": counts.cached}
            for name, count in {**of_prompt, "visual": counts.visual, "kept_visual": counts.kept}.items():
                metrics.add(f"twigvlm_{name}_tokens_total", count)

    def _after_failure(self, way: str, error: Exception) -> None:
        """Handle a failed step. A job whose prefill failed fails; otherwise all rows of the engine are generated again.

        After a failed decoding step the engine's state is unknown, and so is the job that caused it. Answers do not depend on
        the rows beside them, so each job starts over alone and passes on new tokens only; one that fails alone is the cause.
        """
        here = [(job, choice) for key, (job, choice) in self._choices.items() if key[0] == way]
        # Such a row was ended by the engine before its first token; the engine goes on with all others.
        refused = [job for job, choice in here if choice.row and choice.row.finished and not choice.row.drafted]
        if refused:
            for job in dict.fromkeys(refused):
                self._fail(job, error)
            return
        self._metrics.add("twigvlm_engine_failures_total")
        _log.error("a step failed", exc_info=error)
        del self._engines[way]
        self._prefixes.clear()
        jobs = list(dict.fromkeys(job for job, _ in here))
        self._choices = {key: value for key, value in self._choices.items() if key[0] != way}
        if len(jobs) == 1:
            self._fail(jobs[0], error)
            return
        for job in jobs:
            job.restart()
            job.suspect = True
        with self._changed:
            self._waiting.extendleft(reversed(jobs))

    def _end_late_jobs(self) -> None:
        now, limits = time.monotonic(), self._limits
        for job in self._jobs():
            if now - job.arrived > limits.total_seconds:
                self._fail(job, too_late(limits.total_seconds))
        with self._changed:
            ended = {job: error for job in self._waiting if (error := why_given_up(job, now - job.arrived, limits))}
            for job in ended:
                self._waiting.remove(job)
        for job, error in ended.items():
            self._tell(job, Failed(error))

    def _fail(self, job: Job, error: Exception) -> None:
        if is_out_of_memory(error):
            self._prefixes.clear()  # the part that nobody needs
        self._give_up(job, None)
        self._tell(job, Failed(request_error(error)))

    def _give_up(self, job: Job, index: int | None) -> None:
        """Remove a job's rows from their engines, and the job from the queue."""
        for choice in job.choices if index is None else [job.choices[index]]:
            key, choice.key = choice.key, None  # ids begin again with each engine: it may be another row's by now
            if key is not None and key in self._choices and self._choices[key][1] is choice:
                del self._choices[key]
                engine = self._engines.get(key[0])
                if engine is not None and choice.row is not None and not choice.row.finished:
                    engine.cancel(key[1])
            choice.ended = True
        with self._changed:
            if job.ended and job in self._waiting:
                self._waiting.remove(job)

    def _tell(self, job: Job, event: JobEvent) -> None:
        if job.failed:  # it was told so while a step with it ran
            return
        job.failed = isinstance(event, Failed)
        try:
            job.listen(event)
        except Exception:  # nobody listens any more, for example because the event loop is closed
            _log.debug("an event reached nobody", exc_info=True)
