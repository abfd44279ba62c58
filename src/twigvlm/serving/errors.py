"""Errors of requests, with their HTTP status and headers."""

from typing import Any

from twigvlm.errors import TwigVLMError

MAX_MESSAGE = 500  # characters: a message may quote what a client sent


class RequestError(TwigVLMError):
    """A request that is refused or has failed.

    Args:
        message: one line for people to read.
        status: HTTP status.
        param: the field of the request that is at fault.
        code: name of the error for programs; OpenAI's name if OpenAI has such an error.
        retry_after: seconds after which the client should try again.
        final: whether trying again would fail in the same way, although the status suggests it.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        final: bool = False,
    ) -> None:
        # A lone surrogate, which JSON can spell, is no text that could be sent back.
        clean = message.encode(errors="replace").decode()
        super().__init__(clean if len(clean) <= MAX_MESSAGE else f"{clean[:MAX_MESSAGE]}…")
        self.status, self.param, self.code = status, param, code
        self._retry_after, self._final = retry_after, final

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        found = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self._retry_after is not None:
            found["Retry-After"] = str(self._retry_after)
        if self._final:
            found["x-should-retry"] = "false"  # OpenAI's clients try 408 and 5xx again unless they are told not to
        return found

    def as_json(self) -> dict[str, Any]:
        """The error in the form that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
