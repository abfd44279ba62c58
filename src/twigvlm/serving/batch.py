"""Batch files in OpenAI's format, one JSON object per line. A run that was killed at any point can be resumed."""

import hashlib
import json
import os
import queue
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from twigvlm.errors import TwigVLMError, one_line
from twigvlm.files import numbered_lines, replacing, writing
from twigvlm.serving.completion import Completion
from twigvlm.serving.errors import RequestError
from twigvlm.serving.failures import request_error
from twigvlm.serving.jobs import Failed, JobEvent
from twigvlm.serving.limits import Limits
from twigvlm.serving.notes import check_note
from twigvlm.serving.protocol import ChatRequest, parse_request
from twigvlm.serving.service import Service

URL = "/v1/chat/completions"
_PATIENCE = 1e9  # seconds
_AHEAD = 2  # requests that are prepared before there is room for them
_RESULT = b'{"id": "batch_req_'
"""Beginning of every line that `write_result` writes."""


def patient(limits: Limits) -> Limits:
    """The same limits without any limit of time, for a caller who waits for all answers."""
    return replace(limits, waiting_seconds=_PATIENCE, total_seconds=_PATIENCE)


@dataclass(frozen=True)
class BatchLine:
    """One request of a batch file."""

    custom_id: str
    body: dict[str, Any]
    method: str = "POST"
    url: str = URL

    @property
    def id(self) -> str:
        """An id that identifies the request and everything in it, so that a changed request has another one."""
        whole = json.dumps([self.custom_id, self.method, self.url, self.body], sort_keys=True)
        return f"req_{hashlib.sha256(whole.encode()).hexdigest()[:24]}"

    def request(self) -> ChatRequest:
        """Parse the request.

        Raises:
            RequestError: it is not a valid request for a chat completion.
        """
        if self.method != "POST" or self.url != URL:
            raise RequestError(f"{self.method} {self.url}: only POST {URL} is answered"[:200])
        request = parse_request(json.dumps(self.body).encode())
        if request.stream:
            raise RequestError("stream: does not apply to batch files; leave it out", param="stream")
        return request


def read_batch(path: Path) -> list[BatchLine]:
    """The requests of a batch file. An error inside a request becomes its result; an error of the file itself is raised.

    Raises:
        TwigVLMError: the file cannot be read or is empty, or a line is no request or repeats a `custom_id`.
    """
    name = f"input {str(path)!r}"
    lines: dict[str, BatchLine] = {}
    for number, record in json_lines(path, name):
        known = isinstance(record, dict) and isinstance(record.get("custom_id"), str)
        if not known or not isinstance(record.get("body"), dict):
            raise TwigVLMError(f"{name}: line {number}: needs a text `custom_id` and an object `body`")
        if record["custom_id"] in lines:
            raise TwigVLMError(f"{name}: line {number}: custom_id {record['custom_id']!r} is used twice; rename one")
        found = BatchLine(
            record["custom_id"], record["body"], str(record.get("method", "POST")), str(record.get("url", URL))
        )
        lines[found.custom_id] = found
    if not lines:
        raise TwigVLMError(f"{name}: has no request; write one on each line")
    return list(lines.values())


def json_lines(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not empty, and the JSON on it.

    Args:
        path: path of the file.
        name: name of the file in error messages.

    Raises:
        TwigVLMError: the file cannot be read, or a line is not JSON.
    """
    for number, line in numbered_lines(path, name):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TwigVLMError(f"{name}: line {number}: not JSON ({one_line(error)}); correct the line") from None


@contextmanager
def open_results(
    path: Path, lines: Sequence[BatchLine], settings: Mapping[str, Any]
) -> Iterator[tuple[BinaryIO, dict[str, int]]]:
    """Open a file of results for appending.

    A result is one line, flushed to the disk. A run that was killed leaves at most one incomplete line, which is removed. Results
    of server errors (5xx) are removed too, so that these requests are tried again. A file that holds anything other than results
    is left as it is, and nothing is written beside it.

    Args:
        path: path of the file.
        lines: all requests of the batch.
        settings: everything else that the results depend on, JSON-able; noted in a file beside the results.

    Yields:
        The open file, and the status of each request that has a result, by its `custom_id`.

    Raises:
        TwigVLMError: it cannot be written, another run writes to it, or it has results of another batch or other settings.
    """
    name = f"output {str(path)!r}"
    with writing(name), _locked(path, name):
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        rest = data[len(whole) :]
        if not (rest.startswith(_RESULT) or _RESULT.startswith(rest)):
            raise TwigVLMError(f"{name}: does not end with a line of results; choose another file")
        results = _results(name, whole, {line.custom_id: line.id for line in lines})
        check_note(path.with_name(f"{path.name}.settings.json"), settings, bool(results), name, "file")
        kept = {key: status for key, (status, _) in results.items() if status < 500}
        if (new := b"".join(line for status, line in results.values() if status < 500)) != data:
            with replacing(path) as temporary:
                temporary.write_bytes(new)
        with open(path, "ab") as file:
            yield file, kept


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Keep other runs from a file of results while the block runs.

    Args:
        path: path of the file.
        name: name of the file in error messages.

    Raises:
        TwigVLMError: another run is writing there.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_path)  # the system frees it when the process is killed
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise TwigVLMError(f"{name}: another run is writing there; wait until it ends") from None
    try:
        yield
    except TwigVLMError:
        with suppress(OSError):  # not after a run: another one may have opened it, and a third would lock a new one
            lock_path.unlink()
        raise
    finally:
        lock.release()


def _results(name: str, data: bytes, known: Mapping[str, str]) -> dict[str, tuple[int, bytes]]:
    """Status and line of each result, by `custom_id`.

    Args:
        name: name of the file in error messages.
        data: contents of the file.
        known: `custom_id` -> `BatchLine.id`.
    """
    found: dict[str, tuple[int, bytes]] = {}
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            result = json.loads(line)
            key, response = result["custom_id"], result["response"]
            found[key] = int(response["status_code"]), line
            other = key in known and response["request_id"] != known[key]
        except (ValueError, TypeError, KeyError):
            raise TwigVLMError(f"{name}: line {number}: is no result; choose another file") from None
        if other:
            raise TwigVLMError(f"{name}: the request {key!r} has changed since it was answered; choose another file")
    if not found.keys() <= known.keys():
        raise TwigVLMError(f"{name}: has results of another batch; choose another file")
    return found


OnResult = Callable[[str, int, dict[str, Any]], None]
"""(custom_id, HTTP status, body) of a result -> None."""


class BatchRun:
    """Answers the requests of a batch, several at once.

    Args:
        service: the service that answers requests.
        on_result: called with each result as soon as it is complete.
    """

    def __init__(self, service: Service, on_result: OnResult) -> None:
        self._service, self._on_result = service, on_result
        self._events: queue.Queue[tuple[str, JobEvent]] = queue.Queue()
        self._running: dict[str, Completion] = {}

    def run(self, lines: list[BatchLine]) -> None:
        """Answer all requests. Results come in the order in which they are completed."""
        max_running = self._service.limits.max_rows + _AHEAD
        for line in lines:
            while len(self._running) >= max_running:
                self._take()
            self._start(line)
        while self._running:
            self._take()

    def _start(self, line: BatchLine) -> None:
        service, key = self._service, line.custom_id
        try:
            request = line.request()
            job = service.prepare(request, lambda event: self._events.put((key, event)))
        except Exception as error:  # whatever is wrong with one request, the others go on
            refused = request_error(error)
            self._on_result(key, refused.status, refused.as_json())
            return
        self._running[key] = service.completion(request, job)
        service.worker.submit(job)

    def _take(self) -> None:
        """Wait for one event."""
        key, event = self._events.get()
        if key not in self._running:
            return
        completion = self._running[key]
        if isinstance(event, Failed):
            del self._running[key]
            self._on_result(key, event.error.status, event.error.as_json())
            return
        completion.take(event)
        if completion.finished:
            del self._running[key]
            self._on_result(key, 200, completion.as_json())


def write_result(file: BinaryIO, line: BatchLine, status: int, body: dict[str, Any]) -> None:
    """Append a result to a file of `open_results`; it is on the disk when this returns."""
    response = {"status_code": status, "request_id": line.id, "body": body}
    identity = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id}
    # As OpenAI has it: `error` is for requests that got no response, and here each gets one.
    file.write(json.dumps({**identity, "response": response, "error": None}).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
