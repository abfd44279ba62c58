"""The errors that clients are told about, made from exceptions and from jobs that take too long."""

import logging

from twigvlm.errors import TwigVLMError, is_out_of_memory, one_line
from twigvlm.serving.errors import RequestError
from twigvlm.serving.jobs import Job
from twigvlm.serving.limits import Limits

_log = logging.getLogger(__name__)


def request_error(error: Exception) -> RequestError:
    """The error to send to the client. Unexpected exceptions are logged, and the client only learns that the server failed."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, TwigVLMError) and not is_out_of_memory(error):
        return RequestError(str(error))
    if is_out_of_memory(error):
        return RequestError(
            "there is not enough memory for this request; ask with fewer or smaller images",
            503,
            code="out_of_memory",
            final=True,
        )
    _log.error("a request failed: %s", one_line(error), exc_info=error)
    return RequestError("the server failed at this request; its log says why", 500)


def shutting_down() -> RequestError:
    """Error for requests while the server is shutting down (status 503)."""
    return RequestError("the server is shutting down; try again later", 503, code="shutting_down", retry_after=10)


def waited_too_long(seconds: float) -> RequestError:
    """Error for a request that was not started within this many seconds (status 429)."""
    return RequestError(
        f"the request has waited for {seconds:g} seconds; try again later",
        429,
        code="rate_limit_exceeded",
        retry_after=max(1, round(seconds)),
    )


def too_late(seconds: float) -> RequestError:
    """Error for an answer that was not complete within this many seconds (status 408)."""
    return RequestError(
        f"the request took longer than {seconds:g} seconds; ask for a shorter answer", 408, code="timeout", final=True
    )


def why_given_up(job: Job, waited: float, limits: Limits) -> RequestError | None:
    """The error of a waiting job that has waited too long; None: it may go on waiting.

    Args:
        job: a job that has no rows in an engine.
        waited: seconds since it arrived.
        limits: limits of the server.
    """
    if job.suspect:  # it starts over, and has waited before
        return too_late(limits.total_seconds) if waited > limits.total_seconds else None
    return waited_too_long(limits.longest_wait) if waited > limits.longest_wait else None
