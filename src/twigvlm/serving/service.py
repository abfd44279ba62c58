"""From a request to a job and from its events to an answer: what the server, batch files and Ray share."""

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
    """What a request gets that does not say."""

    pruning: PruningConfig = field(default_factory=PruningConfig)
    speculate: str = "none"


class Service:
    """A model that answers requests.

    Args:
        model: what answers.
        processor: the base's.
        name: that requests call the model by.
        defaults: of requests.
        limits: of requests.
        fetcher: of images that are no data URIs; None: there are none.
        max_bytes: of keys and values; None: as many as are free.
        has_twig: whether the model's twig was trained; of `TwigVLM.without_twig` it was not.
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
        has_twig: bool = True,
    ) -> None:
        self.has_twig = has_twig
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

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request while the block runs; called from one thread.

        Raises:
            RequestError: all places are taken.
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
        """What the images of a request are that are not in it, by their addresses. Several threads may do this.

        Args:
            request: what was asked.
            arrived: by the monotonic clock.
            check: called before each file; raises where nobody waits for it any more.

        Raises:
            RequestError: the request cannot be answered, or one of the images cannot be had in time.
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
        """Raise RequestError where the schema of a request takes too much work, which takes seconds to find out.

        `prepare` does this, too, but does not repeat it.
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
        """A job for the worker: images read and text tokenized. One thread at a time does this.

        Args:
            request: what was asked.
            listen: gets the events of the job.
            arrived: by the monotonic clock; None: now.
            fetched: of `fetch`; None: not yet.

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
        """What gathers the events of a request's job."""

        def text() -> AnswerText:
            eos, stops = frozenset(self.eos), request.stops
            return AnswerText(lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)), eos, stops)

        def give_up(index: int) -> None:
            self.worker.cancel(job, index)

        return Completion(self.name, job, text, give_up, bool(request.stream))

    def stop(self, seconds: float = 0.0) -> None:
        """End the worker; jobs under way have that many seconds left."""
        self.worker.stop(seconds)

    def _check_waiting(self, arrived: float) -> None:
        if time.monotonic() - arrived > self.limits.longest_wait:
            raise waited_too_long(self.limits.longest_wait)

    def check(self, request: ChatRequest) -> None:
        """Raise RequestError where it takes no work to see that a request is refused."""
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
        """Options of pruning: those of the request, or else the server's, as far as they are possible for its pictures."""
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
