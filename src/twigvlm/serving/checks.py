"""Checks of a request's options that need no model."""

from dataclasses import fields

from twigvlm.config import PruningConfig
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.pruning.methods import make_pruner, reads_files
from twigvlm.serving.errors import RequestError
from twigvlm.serving.limits import Limits
from twigvlm.serving.protocol import ChatRequest


def check_limits(request: ChatRequest, limits: Limits) -> None:
    """Raise RequestError if a request asks for more answers, or longer ones, than the limits allow."""
    if (request.n or 1) > limits.max_choices:
        raise RequestError(f"n: must be 1 to {limits.max_choices}", param="n")
    asked = asked_length(request)
    if asked is not None and asked > limits.max_tokens:
        raise RequestError(f"max_completion_tokens: must be at most {limits.max_tokens}", param="max_completion_tokens")


def asked_length(request: ChatRequest) -> int | None:
    """The request's largest number of new tokens; None: it names none."""
    return request.max_completion_tokens or request.max_tokens


def asked_pruning(request: ChatRequest, own: str | None = None) -> PruningConfig | None:
    """The request's pruning options; None: it has none.

    Args:
        request: the request.
        own: name of the server's pruner. If it includes a directory, requests name it without: `fitprune`.

    Raises:
        RequestError: the options are invalid, or requests may not ask for them.
    """
    names = {option.name for option in fields(PruningConfig)}
    given = {name: getattr(request, name) for name in names & request.model_fields_set}
    if own is not None and given.get("pruner") == public_name(own):
        given["pruner"] = own
    elif reads_files(given.get("pruner") or ""):
        raise RequestError("pruner: requests cannot name directories; start the server with it", param="pruner")
    if not given:
        return None
    try:
        pruning = PruningConfig(**given)
        if pruning.pruner not in (None, "twig"):
            make_pruner(pruning.pruner)
    except ValueError as error:  # TwigVLMError is one, and so is what int() says of odd digits
        raise RequestError(f"{_cause(error)}{_public(one_line(error), own)}") from None
    return pruning


def public_name(pruner: str) -> str:
    """The name by which clients ask for the server's pruner, which does not reveal its directory."""
    return pruner.partition(":")[0] if reads_files(pruner) else pruner


def _public(text: str, own: str | None) -> str:
    """A text without the directory of the server's pruner."""
    if own is None or not reads_files(own):
        return text
    return text.replace(own, public_name(own)).replace(own.partition(":")[2], public_name(own))


def _cause(error: ValueError) -> str:
    """A prefix that names the option, for errors raised by Python itself, which do not name it."""
    return "" if isinstance(error, TwigVLMError) else "pruner: "
