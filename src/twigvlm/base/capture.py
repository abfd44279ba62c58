"""What a base hands to its language model, taken from its own forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, Final

from torch import nn

_captured: ContextVar[nn.Module | None] = ContextVar("twigvlm_captured", default=None)
"""The module whose call ends the forward of this thread or task: other threads may call the same module meanwhile."""
_hooking: Final = Lock()
"""torch numbers hooks without a lock: of two that get one number, one would be lost."""


class _Arguments(Exception):
    """Ends a forward once the arguments of the captured module are known."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs


def capture(module: nn.Module, forward: Callable[[], Any]) -> dict[str, Any]:
    """Run a forward up to a module that it calls, and return the keyword arguments of that call.

    The module has a hook while this runs. It ends this forward alone: the module's calls in other threads and tasks, by
    whomever, go through.

    Raises:
        Exception: whatever the forward raises before.
    """
    with _hooked(module):
        try:
            forward()
        except _Arguments as arguments:
            return arguments.kwargs
    raise RuntimeError(f"{type(module).__name__} was not called")


@contextmanager
def _hooked(module: nn.Module) -> Iterator[None]:
    # Another thread that is about to call the hooks may find this one gone halfway, and then passes no keyword arguments.
    def end(called: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None and _captured.get() is called:
            raise _Arguments(kwargs)

    with _hooking:
        hook = module.register_forward_pre_hook(end, with_kwargs=True)
    before = _captured.set(module)
    try:
        yield
    finally:
        _captured.reset(before)
        with _hooking:
            hook.remove()
