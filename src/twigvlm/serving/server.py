"""Run the application until a signal ends it."""

from collections.abc import Callable
from socket import socket
from threading import Thread
from types import FrameType

import uvicorn
from fastapi import FastAPI

from twigvlm.serving.service import Service

_PARTING = 5  # seconds in which answers that were given up are told so, before uvicorn cuts the connections


def make_server(app: FastAPI, service: Service, host: str, port: int, seconds: float) -> "Server":
    """A server that SIGTERM and SIGINT end gracefully: what waits is refused, and what is under way has some time left.

    Args:
        app: of `create_app`.
        service: its service.
        host: address to listen on.
        port: 0: any that is free.
        seconds: that answers under way have left.
    """
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(seconds) + _PARTING,
        timeout_keep_alive=30,
        ws="none",
    )
    return Server(config, service, seconds)


class Server(uvicorn.Server):
    """Says when it has started, and ends the service at once when it ends; uvicorn waits for open connections first."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float) -> None:
        super().__init__(config)
        self._service, self._seconds = service, seconds
        self.on_start: Callable[[str], None] = lambda address: None
        """Called with the address, once requests are taken."""

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self.on_start(self.address)

    @property
    def address(self) -> str:
        """What clients call, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: a second SIGINT ends the server without waiting."""
        # In a thread: the code that the signal interrupted may hold the worker's lock.
        Thread(target=self._service.stop, args=(self._seconds,), daemon=True).start()
        super().handle_exit(sig, frame)
