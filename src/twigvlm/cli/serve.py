"""`twigvlm serve`: an OpenAI-compatible server, with a page at `/`."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from twigvlm.cli.serving import ServiceOptions, check_installed
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.serving.keys import checked_key, is_local

KEY_VARIABLE = "TWIGVLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Serve(ServiceOptions):
    """Serve a model behind OpenAI's chat completions API, with a web page at /."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable only from this machine."""
    port: int = 8000
    """Port to listen on; 0: any free port."""
    api_key: str | None = None
    """Key that clients must send. Other users of this machine can read the command line, so prefer the environment variable
    TWIGVLM_API_KEY. None: the variable's value, or no key."""
    allow_host: tuple[str, ...] = ()
    """Host names by which clients may call this server, in addition to those of this machine; *.example.com allows all names that
    end with .example.com. None: any name, unless the server listens only on this machine."""
    shutdown_seconds: float = 30.0
    """Seconds that answers in progress get after SIGTERM or Ctrl-C; waiting requests are refused at once."""
    engine: Literal["twigvlm", "vllm"] = "twigvlm"
    """What generates: this library, or vLLM with an export of the twig."""
    export: Path | None = None
    """With --engine vllm: directory for the exported base and drafter, which are written unless they exist. None: no export,
    so that vLLM cannot be used."""
    vllm_options: str = ""
    """With --engine vllm: further options of `vllm serve`, for example --vllm-options="--tensor-parallel-size 2"."""

    @property
    def continuation(self) -> str:
        """What to do after Ctrl-C."""
        return "the server has stopped; start it again to continue"

    def run(self) -> None:
        """Serve until a signal ends the process."""
        if not 0 <= self.port < 65536:
            raise TwigVLMError(f"port={self.port}: must be 0 to 65535")
        key = checked_key(os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key)
        if key is None and not is_local(self.host):
            print(
                "twigvlm: warning: no --api-key is set, so everyone who can reach this port can use the server",
                file=sys.stderr,
            )
        if self.engine == "vllm":
            from twigvlm.cli.serve_vllm import serve_with_vllm

            for name in ("allow_host", "device", "shutdown_seconds"):
                if getattr(self, name) != getattr(Serve, name):
                    option = f"--{name.replace('_', '-')}"
                    raise TwigVLMError(f"{name}: does not apply to vLLM; leave out either {option} or --engine vllm")
            serve_with_vllm(self, self.export, self.host, self.port, key, self.vllm_options)
        for name, given in (("export", self.export), ("vllm_options", self.vllm_options)):
            if given:
                raise TwigVLMError(f"{name}: applies only to --engine vllm; leave it out")
        check_installed()
        from twigvlm.serving.app import create_app
        from twigvlm.serving.hosts import allowed_hosts
        from twigvlm.serving.server import make_server

        hosts = allowed_hosts(self.host, self.allow_host)
        _check_address(self.host, self.port)
        service = self.open_service()
        app = create_app(service, key, hosts)
        server = make_server(app, service, self.host, self.port, self.shutdown_seconds)
        server.on_start = lambda address: print(f"Serving {service.name!r} at {address}", flush=True)
        try:
            server.run()
        except SystemExit:  # uvicorn's way to say that the port is taken
            raise TwigVLMError(f"port {self.port}: cannot be listened on at {self.host}; choose another") from None
        finally:
            service.stop()


def _check_address(host: str, port: int) -> None:
    """Raise TwigVLMError, before a model is loaded, if the server could not listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's own socket
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise TwigVLMError(
            f"port {port}: cannot be listened on at {host} ({reason}); choose another port or host"
        ) from None
