"""Input errors. Each message is one line that names the value and the remedy."""


class TwigVLMError(ValueError):
    """Bad input, configuration or weight file. The command line prints it without a traceback and exits with 2."""


def one_line(error: Exception) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
