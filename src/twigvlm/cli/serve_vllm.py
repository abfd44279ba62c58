"""`twigvlm serve --engine vllm`: export the twig, and hand over to `vllm serve`."""

from __future__ import annotations

import os
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from twigvlm.config import PruningConfig
from twigvlm.errors import TwigVLMError
from twigvlm.serving.limits import Limits

if TYPE_CHECKING:
    from twigvlm.cli.serving import ServiceOptions


def serve_with_vllm(
    options: ServiceOptions, folder: Path | None, host: str, port: int, api_key: str | None
) -> NoReturn:
    """Replace this process by `vllm serve`.

    Args:
        options: of the command.
        folder: for the export.
        host: address to listen on.
        port: to listen on.
        api_key: that clients must send.

    Raises:
        TwigVLMError: vLLM or the export is not there, or an option does not apply to vLLM.
    """
    folder = check_applies(options, folder)
    if find_spec("twigvlm.integrations") is None or find_spec("twigvlm.integrations.vllm") is None:
        raise TwigVLMError("engine 'vllm': this version of twigvlm has no export for vLLM; leave --engine out")
    program = shutil.which("vllm")
    if program is None:
        raise TwigVLMError("engine 'vllm': there is no command 'vllm'; install vLLM, or leave --engine out")
    environment, command = export(options, folder)
    command += [
        "--host",
        host,
        "--port",
        str(port),
        "--served-model-name",
        options.name or options.model,
    ]
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key  # not on the command line, which others can read
    os.execve(program, [program, *command], {**os.environ, **environment})


def check_applies(options: ServiceOptions, folder: Path | None) -> Path:
    """The directory of the export; raises TwigVLMError where vLLM could not do what the options say."""
    if folder is None:
        raise TwigVLMError("engine 'vllm': needs --export DIRECTORY, where the twig is exported to")
    idle = options.pruning == PruningConfig() and options.limits == Limits() and options.speculate is None
    if not idle or options.allow_image_host:
        raise TwigVLMError(
            "engine 'vllm': options for pruning, speculation, limits and image hosts do not apply to vLLM; leave out either "
            "them or --engine"
        )
    return folder


def export(options: ServiceOptions, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Export base and twig unless that was done before; the environment and arguments of `vllm` that `export` prints.

    Args:
        options: of the command.
        folder: for both.
    """
    import contextlib
    import io

    from twigvlm.cli.export import Export  # type: ignore[import-not-found, unused-ignore]

    base, drafter = folder / "base", folder / "drafter"
    printed, note = io.StringIO(), folder / "command.txt"
    if not note.exists():
        with contextlib.redirect_stdout(printed):
            Export(to="vllm", out=drafter, twig=options.twig, model=options.model, base=base, dtype=options.dtype).run()
        note.write_text(printed.getvalue())
    return vllm_command(note.read_text(), note)


def vllm_command(printed: str, source: Path) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments of the command line that `twigvlm export vllm` printed."""
    line = next((line for line in printed.splitlines() if " serve " in f" {line}"), "")
    words = shlex.split(line)
    if "vllm" not in words:
        raise TwigVLMError(f"{str(source)!r}: has no command line of vLLM; remove the directory, and try again")
    start = words.index("vllm")
    return dict(word.split("=", 1) for word in words[:start]), words[start + 1 :]
