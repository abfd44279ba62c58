"""Run the application until a signal stops it."""

from collections.abc import Callable
from socket import socket
from threading import Thread
from types import FrameType

import uvicorn
from fastapi import FastAPI

from twigvlm.serving.service import Service

_PARTING = 5  # seconds in which answers that were given up are told so, before uvicorn cuts the connections


def make_server(app: FastAPI, service: Service, host: str, port: int, seconds: float) -> "Server":
    """Make a server that SIGTERM and SIGINT stop gracefully: waiting requests are refused, and answers in progress get some time.

    Args:
        app: application from `create_app`.
        service: the application's service.
        host: address to listen on.
        port: port to listen on; 0: any free port.
        seconds: time that answers in progress get after a signal.
    """
    config = uvicorn.Config(
        app,
        host,
        port,
        http="h11",  # it limits headers; httptools, which uvicorn prefers where it is installed, does not
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(seconds) + _PARTING,
        timeout_keep_alive=30,
        ws="none",
    )
    return Server(config, service, seconds)


class Server(uvicorn.Server):
    """A uvicorn server that reports its start, and stops the service on a signal before uvicorn waits for connections."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float) -> None:
        super().__init__(config)
        self._service, self._seconds = service, seconds
        self.on_start: Callable[[str], None] = lambda address: None
        """Called with the server's address once it accepts requests."""

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            self.on_start(self.address)

    @property
    def address(self) -> str:
        """The URL that clients call; valid once the server has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop on a signal; a second SIGINT stops the server without waiting."""
        # In a thread: the code that the signal interrupted may hold the worker's lock.
        Thread(target=self._service.stop, args=(self._seconds,), daemon=True).start()
        super().handle_exit(sig, frame)
