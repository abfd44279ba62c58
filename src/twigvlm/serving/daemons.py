"""Threads that do not keep the process alive."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any
from weakref import finalize

_Task = tuple[Future[Any], Callable[[], Any]]


class DaemonExecutor(Executor):
    """Runs calls in daemon threads, in their order. Threads of Python's own executor are waited for when the process ends, but
    what reads a picture or waits for another host cannot be interrupted.

    Args:
        threads: number of threads; they end with this object.
        name: beginning of their names.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        for number in range(threads):
            Thread(target=_work, args=(self._tasks,), name=f"{name}-{number}", daemon=True).start()
            finalize(self, self._tasks.put, None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call; its result."""
        future: Future[Any] = Future()
        self._tasks.put((future, partial(fn, *args, **kwargs)))
        return future


def _work(tasks: "SimpleQueue[_Task | None]") -> None:
    while (task := tasks.get()) is not None:
        future, call = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del task, future, call  # before the next one comes: a call may hold pictures
