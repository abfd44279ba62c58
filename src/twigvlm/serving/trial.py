"""Compile a JSON schema on trial, in a process that is killed if that takes too much time or memory.

The grammar library limits most of its work, but a large `multipleOf`, hundreds of `patternProperties`, or unions of intersected
patterns keep it busy for minutes, and nothing can interrupt it in this process.

The process runs this file as a script, so this file imports nothing else of the package.
"""

import json
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache

SECONDS = 2
"""Processor time of a trial. Starting takes a tenth of a second of it; ordinary schemas need a few milliseconds."""
MAX_BYTES = 128 << 20
"""Memory of a trial, in bytes. Ordinary schemas need a small part of it."""
_PATIENCE = 10
"""A trial may take this many times `SECONDS` of wall-clock time, since the machine may be busy."""


class TooMuchWork(Exception):
    """A schema takes more time or memory to compile than is allowed."""


def try_schema(text: str) -> None:
    """Compile a schema in another process. The outcome is remembered, unless the machine was too busy to find out.

    Args:
        text: the schema as JSON, with the options of the grammar library.

    Raises:
        TooMuchWork: it takes too much time or memory.
    """
    if not _is_light(text):
        raise TooMuchWork


@lru_cache(64)
def _is_light(text: str) -> bool:
    """Whether a schema compiles within the limits of time and memory."""
    task = json.dumps([list(map(str, sys.path)), text, SECONDS, MAX_BYTES])
    command = [sys.executable, "-I", __file__]
    try:
        # In a session of its own: Ctrl-C is meant for the server, which ends in its own time.
        done = subprocess.run(
            command, input=task, capture_output=True, text=True, timeout=_PATIENCE * SECONDS, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise TooMuchWork from None
    if done.returncode > 0:
        raise RuntimeError(f"schemas cannot be tried: {done.stderr}")
    return done.returncode == 0  # less: a signal, because it has exceeded a limit, or the library has crashed


def _compile() -> None:
    """Compile the schema on stdin. Errors in it are ignored here: they are reported when the server compiles it for use."""
    path, text, seconds, size = json.load(sys.stdin)
    sys.path[:] = path
    import llguidance

    with suppress(ImportError):  # on Windows, where only the time by the clock is limited
        import resource

        # Hard limits: SIGXCPU, which a soft limit of time sends, would write the process to a file.
        limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: seconds, resource.RLIMIT_DATA: size}
        for kind, limit in limits.items():
            with suppress(ValueError):  # a lower limit holds already
                resource.setrlimit(kind, (limit, limit))
    with suppress(ValueError):
        # Compiling takes the same time for every tokenizer; this one is there at once.
        tokenizer, grammar = llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_json_schema(text)
        llguidance.LLMatcher(tokenizer, grammar, log_level=0)


if __name__ == "__main__":
    _compile()
