"""A server process and a client that times its streams, for `recipes.serving_bench`."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil


@contextlib.contextmanager
def serving(*options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server process; its address."""
    command = [sys.executable, "-m", "twigvlm", "serve", "--port", "0", "--dtype", "float32", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("Serving"):
            raise SystemExit("the server did not start")
        yield line.split()[-1], psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


@dataclass
class Timed:
    """One answer over HTTP."""

    text: str = ""
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    error: str = ""


def stream(address: str, body: dict[str, Any]) -> Timed:
    """Ask once, as a stream."""
    parts, result, start = urlsplit(address), Timed(), time.perf_counter()
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=1200)
    try:
        sent = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
        connection.request("POST", "/v1/chat/completions", sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            result.error = f"status {response.status}"
            response.read()
            return result
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                result.error = chunk["error"]["message"]
            for choice in chunk.get("choices", ()):
                result.first = result.first or time.perf_counter() - start
                result.text += choice["delta"].get("content", "")
            if chunk.get("usage"):
                result.tokens = chunk["usage"]["completion_tokens"]
    except (OSError, http.client.HTTPException) as error:
        result.error = repr(error)
    finally:
        connection.close()
        result.seconds = time.perf_counter() - start
    return result
