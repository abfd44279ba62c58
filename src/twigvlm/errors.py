"""Input errors. Each message is one line that names the value and the remedy."""


class TwigVLMError(ValueError):
    """Bad input, configuration or weight file. The command line prints it without a traceback and exits with 2."""


class RequestRefused(TwigVLMError):
    """A step of an engine could not take up some requests, which get no more events.

    Args:
        message: why.
        requests: their ids.
    """

    def __init__(self, message: str, requests: tuple[int, ...]) -> None:
        super().__init__(message)
        self.requests = requests


def one_line(error: Exception) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
