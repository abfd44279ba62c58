"""The HTTP interface: OpenAI's chat completions, health, metrics and the page."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from twigvlm.errors import TwigVLMError
from twigvlm.serving.errors import RequestError
from twigvlm.serving.failures import request_error, shutting_down
from twigvlm.serving.hosts import HostGuard
from twigvlm.serving.keys import authorize, checked_key
from twigvlm.serving.limits import Limits
from twigvlm.serving.memory import Share
from twigvlm.serving.page import add_page
from twigvlm.serving.protocol import parse_request
from twigvlm.serving.running import HUNG_UP, ClientGone, EventStream, Running, Threads
from twigvlm.serving.service import Service

CHAT = "/v1/chat/completions"
FETCHING = 8
"""Number of requests whose images are fetched at the same time. Further ones wait; requests with data URIs only do not."""


def create_app(
    service: Service, api_key: str | None = None, hosts: Collection[str] = (), stop_with_app: bool = True
) -> FastAPI:
    """Make the FastAPI application of a server.

    Args:
        service: the service that answers requests.
        api_key: key that clients must send; None: no key is needed.
        hosts: names that a request's Host header may have, from `allowed_hosts`; none: any name.
        stop_with_app: whether the service is stopped when the application shuts down.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if stop_with_app:
            await asyncio.to_thread(service.stop)

    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    respond = _add_errors(app, service)
    if hosts:
        app.add_middleware(HostGuard, hosts=hosts, refuse=respond)
    handler, key = ChatHandler(service), checked_key(api_key)

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        authorize(request.headers.get("authorization", ""), key)
        return await handler.answer(request)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        authorize(request.headers.get("authorization", ""), key)
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        authorize(request.headers.get("authorization", ""), key)
        if name != service.name:
            raise RequestError(
                f"model: this server has only {service.name!r}", 404, param="model", code="model_not_found"
            )
        return JSONResponse(_model(service))

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        alive = service.worker.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        authorize(request.headers.get("authorization", ""), key)
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    add_page(app, service, needs_key=key is not None)
    return app


class ChatHandler:
    """Answers HTTP requests for chat completions.

    Args:
        service: the service that answers requests.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._threads = Threads(
            fetching=ThreadPoolExecutor(FETCHING, thread_name_prefix="twigvlm-fetch"),
            checking=ThreadPoolExecutor(1, thread_name_prefix="twigvlm-schema"),
            preparing=ThreadPoolExecutor(1, thread_name_prefix="twigvlm-prepare"),
        )

    async def answer(self, http: Request) -> Response:
        """The response to a request. Errors in the request are raised before a stream begins."""
        try:
            return await self._answer(http)
        except asyncio.CancelledError:
            if not self._service.worker.draining:
                raise
            raise shutting_down() from None  # uvicorn's way to end what is left when the time of a shutdown is over

    async def _answer(self, http: Request) -> Response:
        arrived, service = time.monotonic(), self._service
        with ExitStack() as stack:
            stack.enter_context(service.slot())
            share = stack.enter_context(service.memory.share())
            # Not by a name: the body would be held as long as the answer takes, beside what is read from it. What takes long to
            # parse is refused, so that this holds up no other request.
            request = parse_request(await _body(http, service.limits, share))
            running = Running(service, request, http, share)
            stack.callback(running.close)
            await running.start(self._threads, arrived)
            stack.callback(lambda: service.metrics.observe("twigvlm_request_seconds", time.monotonic() - arrived))
            if not request.stream:
                whole = await running.whole()
                service.metrics.add("twigvlm_requests_total", label='status="200"')
                return JSONResponse(whole)
            kept = stack.pop_all()  # the response closes it

        def done() -> None:
            kept.close()
            service.metrics.add("twigvlm_requests_total", label=f'status="{running.status}"')

        return EventStream(running.chunks(), done, 2 * service.limits.total_seconds)


async def _body(http: Request, limits: Limits, share: Share) -> bytes:
    """Read the body of a request.

    Raises:
        RequestError: its Content-Type is not JSON, it is too large or arrives too slowly, or other requests hold too much memory.
        ClientGone: the client has hung up.
    """
    limit, seconds = limits.max_body, limits.upload_seconds
    # Browsers send other types to foreign servers without asking them first.
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("Content-Type: must be application/json", 415)
    too_large = RequestError(f"the request has more than {limit:,} bytes", 413, code="request_too_large")
    length = http.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or len(length) > 18 or int(length) > limit:
        raise too_large
    parts, size = [], 0
    try:
        with anyio.fail_after(seconds):
            while True:
                message = await http.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                share.take(len(parts[-1]))
                size += len(parts[-1])
                if size > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(
            f"the request did not arrive within {seconds:g} seconds; send less", 408, code="timeout"
        ) from None


def _add_errors(app: FastAPI, service: Service) -> Callable[[str, RequestError], Response]:
    """Register the error handlers; returns the function that makes the response for a path and an error."""

    def count(path: str, status: int) -> None:
        if path.endswith(CHAT):  # behind a prefix, where the application is mounted
            service.metrics.add("twigvlm_requests_total", label=f'status="{status}"')

    def respond(path: str, error: RequestError) -> Response:
        count(path, error.status)
        return JSONResponse(error.as_json(), error.status, headers=error.headers)

    @app.exception_handler(TwigVLMError)
    async def refused(request: Request, error: TwigVLMError) -> Response:
        return respond(request.url.path, request_error(error))

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> Response:
        response = respond(request.url.path, RequestError(str(error.detail), error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        count(request.url.path, HUNG_UP)
        return Response(status_code=HUNG_UP)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return respond(request.url.path, request_error(error))

    return respond


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "twigvlm"}
