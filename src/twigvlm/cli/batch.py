"""`twigvlm batch`: answer a batch file in OpenAI's format on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from tyro.conf import Positional, arg

from twigvlm.cli.serving import ServiceOptions, check_installed
from twigvlm.errors import TwigVLMError
from twigvlm.serving.limits import Limits

if TYPE_CHECKING:
    from twigvlm.serving.batch import BatchLine

_OF_SERVERS = ("max_waiting", "max_held", "upload_seconds", "waiting_seconds", "total_seconds")
"""Limits that only concern clients of a server. The requests of a file wait as long as it takes."""

_OF_REQUESTS = ("max_tokens", "max_choices", "max_images", "max_pixels", "max_request_pixels", "max_body")
"""Limits that decide whether a request is refused and how long its answer is, so that results depend on them."""


@dataclass(frozen=True)
class Batch(ServiceOptions):
    """Answer a batch file in OpenAI's format; an interrupted run continues where it stopped."""

    input: Annotated[Path, Positional, arg(metavar="INPUT")]
    """File of requests: JSON objects with `custom_id` and `body`, one per line."""
    output: Annotated[Path, Positional, arg(metavar="OUTPUT")]
    """File of results, in the order in which requests finish. A request that already has a result there is not answered again,
    unless the result is a server error."""

    @property
    def continuation(self) -> str:
        """How to continue after Ctrl-C, for the message."""
        return "run the command again to continue where it stopped"

    def run(self) -> int:
        """Answer all requests; the exit code is 2 if one failed, in this run or an earlier one."""
        for name in _OF_SERVERS:
            if (value := getattr(self.limits, name)) != getattr(Limits, name):
                option = f"--{name.replace('_', '-')}"
                raise TwigVLMError(f"{name}={value:g}: does not apply to batch files; leave {option} out")
        check_installed()
        from twigvlm.cli.output import check_directory, check_file
        from twigvlm.files import writing
        from twigvlm.serving.batch import open_results, read_batch

        check_file(self.input, f"input {str(self.input)!r}", "a .jsonl file with one request per line")
        output = f"output {str(self.output)!r}"
        with writing(output):
            if self.output.is_dir():
                raise TwigVLMError(f"{output}: is a directory; name a file")
            check_directory(self.output.parent, "output")
        lines = {line.custom_id: line for line in read_batch(self.input)}
        with writing(output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
        with open_results(self.output, [*lines.values()], self.settings) as (file, statuses):
            left = [line for key, line in lines.items() if key not in statuses]
            if left:
                self._answer(left, lines, file, statuses)
        failed = sum(status != 200 for status in statuses.values())
        text = f"Results: {self.output}" if left else f"All {len(lines)} requests have their results in {self.output}"
        print(text + (f"; {failed} of {len(lines)} requests failed" if failed else ""))
        return 2 if failed else 0

    def _answer(
        self, left: list[BatchLine], lines: dict[str, BatchLine], file: BinaryIO, statuses: dict[str, int]
    ) -> None:
        """Answer requests, and append their results to the file.

        Args:
            left: requests without a result.
            lines: all requests of the batch, by `custom_id`.
            file: from `open_results`.
            statuses: HTTP status of each result, by `custom_id`; the new ones are added.
        """
        from twigvlm.cli.output import steps
        from twigvlm.serving.batch import BatchRun, patient, write_result

        service = self.open_service(patient(self.limits))
        try:
            with steps("Answering", len(lines), len(statuses)) as advance:

                def on_result(custom_id: str, status: int, body: dict[str, Any]) -> None:
                    write_result(file, lines[custom_id], status, body)
                    statuses[custom_id] = status
                    advance()

                BatchRun(service, on_result).run(left)
        finally:
            service.stop()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that results depend on, except for the requests."""
        from twigvlm.loading import default_twig
        from twigvlm.pruning.methods import method_files
        from twigvlm.serving.notes import noted_twig

        return {
            **{name: getattr(self, name) for name in ("model", "dtype", "speculate")},
            "name": self.name or self.model,
            "allow_image_host": sorted(self.allow_image_host),
            "twig": noted_twig(self.twig or default_twig(self.model)),
            **asdict(self.pruning),
            **method_files([self.pruning.pruner]),
            **{name: getattr(self.limits, name) for name in _OF_REQUESTS},
        }
