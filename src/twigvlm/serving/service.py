"""Turns requests into jobs, and the events of a job into an answer; shared by the server, batch files and Ray."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from threading import Lock
from typing import Any

from twigvlm.config import WITHOUT_TWIG, PruningConfig
from twigvlm.errors import TwigVLMError, is_out_of_memory
from twigvlm.inputs import build_inputs
from twigvlm.model import TwigVLM
from twigvlm.serving.checks import asked_length, asked_pruning, check_limits
from twigvlm.serving.completion import Completion
from twigvlm.serving.errors import RequestError
from twigvlm.serving.failures import request_error, shutting_down, waited_too_long
from twigvlm.serving.fetch import Fetcher
from twigvlm.serving.fit import fitted
from twigvlm.serving.grammar import Grammar, Grammars
from twigvlm.serving.jobs import Job, JobEvent
from twigvlm.serving.limits import Limits
from twigvlm.serving.memory import Memory
from twigvlm.serving.messages import template_messages
from twigvlm.serving.metrics import Metrics, server_metrics
from twigvlm.serving.pictures import check_pixels, fetch_pictures
from twigvlm.serving.protocol import ChatRequest, ImagePart, TextPart
from twigvlm.serving.text import AnswerText
from twigvlm.serving.worker import Worker
from twigvlm.visualize import patch_grid

_COLDEST = 1e-4
"""Temperature below which the most probable token is chosen, as a draw would: dividing by less overflows."""

_TEXT_PER_TOKEN = 64  # characters; no prompt that fits into the context has more


@dataclass(frozen=True)
class Defaults:
    """Pruning and speculation of requests that do not ask for any."""

    pruning: PruningConfig = field(default_factory=PruningConfig)
    speculate: str = "none"


class Service:
    """A model that answers requests.

    Args:
        model: the model that answers.
        processor: the base's processor.
        name: name by which requests call the model.
        defaults: options of requests that do not ask for any; None: neither pruning nor speculation.
        limits: limits that requests must keep; None: the defaults of `Limits`.
        fetcher: fetches images that are not data URIs; None: only data URIs are accepted.
        max_bytes: memory for keys and values, in bytes; None: as much as is free.
    """

    def __init__(
        self,
        model: TwigVLM,
        processor: Any,
        name: str,
        defaults: Defaults | None = None,
        limits: Limits | None = None,
        fetcher: Fetcher | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.defaults, self.limits = defaults or Defaults(), limits or Limits()
        self.fetcher = fetcher or Fetcher((), 0)
        self.created = int(time.time())
        self.metrics: Metrics = server_metrics()
        self.tokenizer = processor.tokenizer
        eos = model.generation_config.eos_token_id
        eos = processor.tokenizer.eos_token_id if eos is None else eos
        self.eos: list[int] = [eos] if isinstance(eos, int) else list(eos or ())
        self.context: int = model.base.context or 2**31
        self.grammars = Grammars(self.tokenizer, model.base.vocabulary, self.eos)
        self._preparing = Lock()
        self._inside = 0
        self.memory = Memory(self.limits.max_held)
        self.worker = Worker(model, self.limits, self.metrics, max_bytes)

    @property
    def has_twig(self) -> bool:
        """Whether the model has a twig; the stand-in of `TwigVLM.without_twig` does not count."""
        return not self.model.twig.is_stand_in

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the server's slots for requests while the block runs. Call this from one thread only.

        Raises:
            RequestError: all slots are taken.
        """
        if self._inside >= self.limits.max_rows + self.limits.max_waiting:
            raise RequestError(
                f"the server has {self._inside} requests already; try again later",
                429,
                code="rate_limit_exceeded",
                retry_after=1,
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def fetch(
        self, request: ChatRequest, arrived: float, check: Callable[[], object] = lambda: None
    ) -> dict[str, bytes]:
        """Fetch the images that a request names by address. Several threads may call this at once.

        Args:
            request: the request.
            arrived: when the request arrived, in seconds of `time.monotonic`.
            check: called before each file; raises if the client no longer waits.

        Returns:
            The files by their addresses.

        Raises:
            RequestError: the request cannot be answered, or an image cannot be fetched in time.
        """
        self.check(request)
        self._check_waiting(arrived)

        def go_on() -> None:
            check()
            if self.worker.draining:
                raise shutting_down()

        limits = self.limits
        return fetch_pictures(request, self.fetcher, arrived + limits.longest_wait, limits.max_body, go_on)

    def check_schema(self, request: ChatRequest) -> None:
        """Raise RequestError if the JSON schema of a request takes too much work to compile; finding out may take seconds.

        `prepare` checks this as well, and does not repeat a check that was made here.
        """
        if request.answer_schema is not None:
            self.grammars.check(request.answer_schema)

    def prepare(
        self,
        request: ChatRequest,
        listen: Callable[[JobEvent], None],
        arrived: float | None = None,
        fetched: dict[str, bytes] | None = None,
    ) -> Job:
        """Read the images of a request, tokenize its text, and make a job for the worker. Threads take turns at this.

        Args:
            request: the request.
            listen: called with each event of the job, from the worker's thread; must return at once.
            arrived: when the request arrived, in seconds of `time.monotonic`; None: now.
            fetched: result of `fetch`; None: the images are fetched here.

        Raises:
            RequestError: the request cannot be answered.
        """
        arrived = time.monotonic() if arrived is None else arrived
        self.check(request)
        if fetched is None:
            fetched = self.fetch(request, arrived)
        with self._preparing:  # tokenizers are not for several threads
            if self.worker.draining:
                raise shutting_down()
            self._check_waiting(arrived)
            check_pixels(request, self.limits, fetched)
            messages = template_messages(request, self.limits.max_pixels, fetched)
            try:
                inputs = build_inputs(self.processor, [messages], self.model.device, self.model.dtype)
            except TwigVLMError as error:
                if is_out_of_memory(error):
                    raise request_error(error) from None
                raise RequestError(str(error), param="messages") from None
            grammar = self._grammar(request)
        options = {
            **self._pruning(request, inputs),
            **self._sampling(request),
            "max_new_tokens": self._length(request, self.model.base.least_positions(inputs["input_ids"])),
            "eos_token_id": self.eos or None,
        }
        job = Job(
            inputs, options, self._speculate(request), self._seeds(request), listen, grammar, request.details, arrived
        )
        if request.details:
            visual = int(self.model.base.visual_mask(inputs["input_ids"]).sum())
            job.grid = patch_grid(self.model.model, visual, inputs)
        if self.limits.prefix_bytes:
            job.pictures.digest_all()
        return job

    def completion(self, request: ChatRequest, job: Job) -> Completion:
        """The completion that collects the events of a request's job."""

        def text() -> AnswerText:
            eos, stops = frozenset(self.eos), request.stops
            return AnswerText(lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)), eos, stops)

        def give_up(index: int) -> None:
            self.worker.cancel(job, index)

        return Completion(self.name, job, text, give_up, bool(request.stream))

    def stop(self, seconds: float = 0.0) -> None:
        """Stop the worker. Jobs in progress get this many more seconds, and then fail."""
        self.worker.stop(seconds)

    def _check_waiting(self, arrived: float) -> None:
        if time.monotonic() - arrived > self.limits.longest_wait:
            raise waited_too_long(self.limits.longest_wait)

    def check(self, request: ChatRequest) -> None:
        """Raise RequestError for whatever can be refused without reading images or tokenizing text."""
        limits = self.limits
        if request.model != self.name:
            raise RequestError(f"model: this server has only {self.name!r}", 404, param="model", code="model_not_found")
        check_limits(request, limits)
        parts = [part for message in request.messages for part in message.parts]
        images = sum(isinstance(part, ImagePart) for part in parts)
        if images > limits.max_images:
            raise RequestError(
                f"messages: {images} images are more than {limits.max_images}; send fewer", param="messages"
            )
        length = sum(len(part.text) for part in parts if isinstance(part, TextPart))
        if length > _TEXT_PER_TOKEN * self.context:
            raise self._too_long(f"{length:,} characters")

    def _pruning(self, request: ChatRequest, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pruning options: the request's, or the server's with a budget that is possible for the request's pictures."""
        asked, base = asked_pruning(request, self.defaults.pruning.pruner), self.model.base
        pruning = asked or self.defaults.pruning
        if pruning.active and pruning.pruner in (None, "twig") and not self.has_twig:
            raise RequestError("retain: this model has no twig; name another method with pruner", param="pruner")
        if asked is None or request.fit_budget:
            visual = int(base.visual_mask(inputs["input_ids"]).sum())
            pruning = fitted(pruning, visual, base.num_layers, self.model.twig.config)
        return {option.name: getattr(pruning, option.name) for option in fields(pruning)}

    def _speculate(self, request: ChatRequest) -> str:
        speculate = request.speculate or self.defaults.speculate
        if speculate not in WITHOUT_TWIG and not self.has_twig:
            raise RequestError("speculate: this model has no twig to draft with; leave it out", param="speculate")
        if speculate == "auto" and self.defaults.speculate != "auto":
            # It would be measured first, and all that is under way would wait.
            raise RequestError(
                "speculate: 'auto' needs a server started with it; choose another way", param="speculate"
            )
        if speculate == "exit" and not self.model.twig.config.trunk_layers:
            raise RequestError(
                "speculate: 'exit' needs a server started with it; choose another way", param="speculate"
            )
        return speculate

    def _sampling(self, request: ChatRequest) -> dict[str, Any]:
        one: dict[str, Any] = {"num_beams": 1}  # whatever the checkpoint's generation config says
        if (temperature := _temperature(request)) is None:
            return {**one, "do_sample": False}
        return {**one, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": request.top_p or 1.0}

    def _seeds(self, request: ChatRequest) -> list[int | None]:
        """The seed of each answer; the first one's is the request's."""
        if _temperature(request) is None:
            return [None] * (request.n or 1)
        first = secrets.randbits(62) if request.seed is None else request.seed % 2**63
        return [(first + number) % 2**63 for number in range(request.n or 1)]

    def _length(self, request: ChatRequest, prompt: int) -> int:
        """Most new tokens."""
        asked = asked_length(request)
        room = self.context - prompt
        if room < (asked or 1):
            raise self._too_long(f"{prompt:,} tokens" + (f" and an answer of {asked:,}" if asked else ""))
        return asked or min(self.limits.max_tokens, room)

    def _grammar(self, request: ChatRequest) -> Grammar | None:
        return None if request.answer_schema is None else self.grammars.compile(request.answer_schema)

    def _too_long(self, length: str) -> RequestError:
        return RequestError(
            f"messages: {length} do not fit into the model's context of {self.context:,} tokens; shorten them",
            param="messages",
            code="context_length_exceeded",
        )


def _temperature(request: ChatRequest) -> float | None:
    """Temperature of the sampling: OpenAI's 1 where only `top_p` or `n` asks for it; None: the most probable token is chosen."""
    temperature = request.temperature
    if temperature is None:
        temperature = 1.0 if request.top_p is not None or (request.n or 1) > 1 else 0.0
    return None if temperature < _COLDEST or request.top_p == 0 else temperature
