"""What can be said of a request's options before a model is there."""

from dataclasses import fields

from twigvlm.config import PruningConfig
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.pruning.methods import make_pruner, reads_files
from twigvlm.serving.errors import RequestError
from twigvlm.serving.limits import Limits
from twigvlm.serving.protocol import ChatRequest


def check_limits(request: ChatRequest, limits: Limits) -> None:
    """Raise RequestError where a request asks for more or longer answers than it may."""
    if (request.n or 1) > limits.max_choices:
        raise RequestError(f"n: must be 1 to {limits.max_choices}", param="n")
    asked = asked_length(request)
    if asked is not None and asked > limits.max_tokens:
        raise RequestError(f"max_completion_tokens: must be at most {limits.max_tokens}", param="max_completion_tokens")


def asked_length(request: ChatRequest) -> int | None:
    """Most new tokens; None: the request does not say."""
    return request.max_completion_tokens or request.max_tokens


def asked_pruning(request: ChatRequest, own: str | None = None) -> PruningConfig | None:
    """Options of pruning; None: the request has none.

    Args:
        request: what was asked.
        own: the server's pruner. One that reads a directory is asked for without it: `fitprune`.

    Raises:
        RequestError: there is no such pruning, or requests may not ask for it.
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
        raise RequestError(f"{_cause(error)}{one_line(error)}") from None
    return pruning


def public_name(pruner: str) -> str:
    """What clients call the server's pruner: its directory is nobody's business."""
    return pruner.partition(":")[0] if reads_files(pruner) else pruner


def _cause(error: ValueError) -> str:
    """The option that an error of Python's own, which names none, is about."""
    return "" if isinstance(error, TwigVLMError) else "pruner: "
