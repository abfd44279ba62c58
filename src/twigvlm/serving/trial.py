"""Compile a JSON schema on trial, in a process that ends when that takes too much time or memory.

The grammar library limits most of its work, but not all that it does to compile a schema: a large `multipleOf`, hundreds of
`patternProperties` and unions of intersected patterns keep it busy for minutes, and nothing can interrupt it in this process.

The process runs this file as a script, so it imports nothing of the package.
"""

import json
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache

SECONDS = 2
"""Processor time of a trial, a tenth of a second of which it takes to start. Ordinary schemas need a few milliseconds."""
MAX_BYTES = 128 << 20
"""Memory of a trial. Ordinary schemas leave most of it free."""
_PATIENCE = 10
"""How many times longer a trial may take by the clock than by the processor's time: the machine may be busy."""


class TooMuchWork(Exception):
    """A schema takes more time or memory to compile than it may."""


@lru_cache(64)
def try_schema(text: str) -> None:
    """Compile a schema in another process. Those that were fine are remembered.

    Args:
        text: the schema as JSON, with the options of the grammar library.

    Raises:
        TooMuchWork: it takes too much time or memory.
    """
    task = json.dumps([list(map(str, sys.path)), text, SECONDS, MAX_BYTES])
    command = [sys.executable, "-I", __file__]
    try:
        # In a session of its own: Ctrl-C is meant for the server, which ends in its own time.
        done = subprocess.run(
            command, input=task, capture_output=True, text=True, timeout=_PATIENCE * SECONDS, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise TooMuchWork from None
    if done.returncode < 0:  # a signal: it has exceeded a limit, or the library has crashed
        raise TooMuchWork
    if done.returncode:
        raise RuntimeError(f"schemas cannot be tried: {done.stderr}")


def _compile() -> None:
    """Compile the schema on stdin. What is wrong with it is found again, and told, where it is compiled to be used."""
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
