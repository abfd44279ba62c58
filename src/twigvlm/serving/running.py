"""One request over HTTP: connects the event loop and the worker's thread."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, NamedTuple, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from twigvlm.serving.completion import Completion
from twigvlm.serving.errors import RequestError
from twigvlm.serving.failures import waited_too_long
from twigvlm.serving.jobs import Failed, Job, JobEvent, Tokens
from twigvlm.serving.memory import Share
from twigvlm.serving.pictures import is_fetched
from twigvlm.serving.protocol import ChatRequest
from twigvlm.serving.service import Service

HUNG_UP = 499
"""Status of requests whose client has hung up. Nobody reads it; the metrics count it."""

Result = TypeVar("Result")


_GRACE = 1.0
"""Extra seconds after the longest wait, in which a thread may still report what took too long, such as an image host."""


class Threads(NamedTuple):
    """Threads that prepare requests."""

    fetching: Executor
    """Threads that fetch images from other hosts."""
    checking: Executor
    """One thread, which waits while a schema is compiled on trial."""
    preparing: Executor
    """One thread, which reads images and tokenizes text once everything has been fetched."""


class ClientGone(Exception):
    """The client has hung up."""


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        chunks: the events, formatted.
        done: called when the stream has ended, the client has hung up, or the stream never began.
        seconds: time within which the client must have read the whole stream.
    """

    def __init__(self, chunks: AsyncIterator[str], done: Callable[[], None], seconds: float) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._done, self._seconds = done, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with anyio.fail_after(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # a client that stops reading must not keep its place; the server closes the connection
            pass
        finally:
            self._done()


class Running:
    """One HTTP request while it is answered.

    Args:
        service: the service that answers it.
        request: the parsed request.
        http: the HTTP request, which tells when the client hangs up.
        share: counts the memory that the request holds.
    """

    def __init__(self, service: Service, request: ChatRequest, http: Request, share: Share) -> None:
        self._service, self._http, self._share = service, http, share
        # An executor's queue keeps what was cancelled until a thread comes to it, so it gets this object, which lets go of both.
        self._request: ChatRequest | None = request
        self._fetched: dict[str, bytes] = {}
        self._events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._job: Job | None = None
        self._gone = asyncio.create_task(self._watch())
        self._first: Tokens | None = None
        self.status = HUNG_UP
        """HTTP status for the metrics, valid once the stream has ended."""
        self._completion: Completion | None = None

    async def start(self, threads: Threads, arrived: float) -> None:
        """Prepare the request, submit its job, and wait for the first tokens.

        Args:
            threads: threads that prepare requests.
            arrived: when the request arrived, in seconds of `time.monotonic`.

        Raises:
            RequestError: the request cannot be answered, or was not prepared in time.
            ClientGone: the client has hung up.
        """
        service, metrics = self._service, self._service.metrics
        metrics.add("twigvlm_requests_waiting")
        try:
            service.check(self._asked)  # here: what prepares requests may be busy with others
            left = arrived + service.limits.longest_wait + _GRACE - time.monotonic()
            job = await self._unless_gone(self._prepare(threads, arrived), max(0.0, left))
            self._share.take(job.bytes)
            self._job, self._completion = job, service.completion(self._asked, job)
            service.worker.submit(job)
            self._first = await self._next()
        finally:
            metrics.add("twigvlm_requests_waiting", -1)

    async def _prepare(self, threads: Threads, arrived: float) -> Job:
        run = self._loop.run_in_executor
        if self._asked.answer_schema is not None:
            await run(threads.checking, self._check_schema)
        if any(is_fetched(part) for message in self._asked.messages for part in message.parts):
            self._fetched = await run(threads.fetching, self._fetch, arrived)
        size = sum(map(len, self._fetched.values()))
        self._share.take(size)
        job = await run(threads.preparing, self._make_job, arrived)
        self._fetched = {}
        self._share.give_back(size)
        return job

    def _check_schema(self) -> None:
        self._service.check_schema(self._asked)

    def _fetch(self, arrived: float) -> dict[str, bytes]:
        return self._service.fetch(self._asked, arrived, lambda: self._asked)

    def _make_job(self, arrived: float) -> Job:
        return self._service.prepare(self._asked, self._listen, arrived, self._fetched)

    @property
    def _asked(self) -> ChatRequest:
        """The request. Raises ClientGone if the client no longer waits for the answer."""
        if self._request is None:
            raise ClientGone
        return self._request

    async def chunks(self) -> AsyncIterator[str]:
        """The server-sent events of a stream."""
        completion = self._completion
        assert completion is not None, "it has started"
        options = self._asked.stream_options
        counted = options is not None and options.include_usage
        try:
            async for event in self._tokens():
                for chunk in completion.take(event):
                    yield _sse({**chunk, "usage": None} if counted else chunk)
        except RequestError as error:
            self.status = error.status
            yield _sse(error.as_json())
            return
        except ClientGone:
            return
        if counted:
            yield _sse(completion.usage_chunk())
        self.status = 200
        yield "data: [DONE]\n\n"

    async def whole(self) -> dict[str, Any]:
        """The whole completion.

        Raises:
            RequestError: the request has failed.
            ClientGone: the client has hung up.
        """
        completion = self._completion
        assert completion is not None, "it has started"
        async for event in self._tokens():
            completion.take(event)
        return completion.as_json()

    async def _tokens(self) -> AsyncIterator[Tokens]:
        """All events, the first one included, until the answers are complete."""
        assert self._completion is not None
        assert self._first is not None
        yield self._first
        while not self._completion.finished:
            yield await self._next()

    async def _next(self) -> Tokens:
        event = await self._unless_gone(self._events.get())
        if isinstance(event, Failed):
            raise event.error
        return event

    async def _unless_gone(self, result: Coroutine[Any, Any, Result], seconds: float | None = None) -> Result:
        """Wait for a result, unless the client hangs up first.

        Args:
            result: coroutine that gives the result.
            seconds: longest time to wait; None: no limit.

        Raises:
            ClientGone: the client has hung up.
            RequestError: the result did not come in time.
        """
        coming = asyncio.create_task(result)
        try:
            await asyncio.wait({coming, self._gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
            raise ClientGone if self._gone.done() else waited_too_long(self._service.limits.longest_wait)
        finally:
            coming.cancel()

    def _listen(self, event: JobEvent) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _watch(self) -> None:
        """Return when the client hangs up."""
        while (await self._http.receive())["type"] != "http.disconnect":
            pass

    def close(self) -> None:
        """Release everything that the request holds, and cancel its job unless it has finished."""
        self._gone.cancel()
        if self._job is not None and not (self._completion is not None and self._completion.finished):
            self._service.worker.cancel(self._job)
        # A job refers to this object by what it tells its events to. In a circle its pictures would wait for Python's collector.
        self._job = self._completion = self._request = None
        self._fetched = {}


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
