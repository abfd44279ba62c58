"""`twigvlm batch`: answer a batch file in OpenAI's format on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from twigvlm.cli.serving import ServiceOptions, check_installed
from twigvlm.errors import TwigVLMError
from twigvlm.serving.limits import Limits

_OF_SERVERS = ("max_waiting", "max_held", "upload_seconds", "waiting_seconds", "total_seconds")
"""Limits of what clients send; the requests of a file wait as long as it takes."""


@dataclass(frozen=True)
class Batch(ServiceOptions):
    """Answer a batch file in OpenAI's format; an interrupted run continues where it stopped."""

    input: Annotated[Path, Positional, arg(metavar="INPUT")]
    """File of requests: JSON objects with `custom_id` and `body`, one per line."""
    output: Annotated[Path, Positional, arg(metavar="OUTPUT")]
    """File of results, in the order in which they are complete; requests that have theirs there are not answered again."""

    @property
    def continuation(self) -> str:
        """What to do after Ctrl-C."""
        return "run the command again to go on where it stopped"

    def run(self) -> int:
        """Answer all requests; the exit code is 2 if one failed."""
        for name in _OF_SERVERS:
            if (value := getattr(self.limits, name)) != getattr(Limits, name):
                option = f"--{name.replace('_', '-')}"
                raise TwigVLMError(f"{name}={value:g}: does not apply to batch files; leave {option} out")
        check_installed()
        from twigvlm.cli.output import check_directory, steps
        from twigvlm.serving.batch import BatchRun, open_results, patient, read_batch, write_result

        if self.output.is_dir():
            raise TwigVLMError(f"output {str(self.output)!r}: is a directory; name a file")
        check_directory(self.output.parent, "output")
        lines = read_batch(self.input)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        failed = 0
        with open_results(self.output, {line.custom_id for line in lines}) as (file, answered):
            left = [line for line in lines if line.custom_id not in answered]
            if not left:
                print(f"All {len(lines)} requests have their results in {self.output}")
                return 0
            service = self.open_service(patient(self.limits))
            try:
                with steps("Answering", len(lines), len(answered)) as advance:

                    def on_result(custom_id: str, status: int, body: dict[str, Any]) -> None:
                        nonlocal failed
                        write_result(file, custom_id, status, body)
                        failed += status != 200
                        advance()

                    BatchRun(service, on_result).run(left)
            finally:
                service.stop()
        print(f"Results: {self.output}" + (f"; {failed} of {len(left)} requests failed" if failed else ""))
        return 2 if failed else 0
