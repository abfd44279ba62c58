"""What a base hands to its language model and what its vision tower computes, taken from its own forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any, Final, NamedTuple

from torch import nn

_captured: ContextVar[nn.Module | None] = ContextVar("twigvlm_captured", default=None)
"""The module whose call ends the forward of this thread or task: other threads may call the same module meanwhile."""
_calls: ContextVar["list[Call] | None"] = ContextVar("twigvlm_calls", default=None)
"""Where calls of watched modules by this thread or task are noted."""
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


class Call(NamedTuple):
    """One call of a module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def states(self) -> Any:
        """Its first argument, however it was passed."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


@contextmanager
def watch(modules: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """Note the calls that this thread or task makes of some modules, in their order. The modules have hooks meanwhile."""
    calls: list[Call] = []

    def note(called: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        # Hooks of other threads' watches run here too, as long as those last. The call is this watch's own only once.
        if _calls.get() is calls and len(rest) == 2:
            calls.append(Call(called, args, *rest))

    with _hooking:
        hooks = [module.register_forward_hook(note, with_kwargs=True) for module in dict.fromkeys(modules)]
    before = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(before)
        with _hooking:
            for hook in hooks:
                hook.remove()
