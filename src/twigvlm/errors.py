"""Input errors. Each message is one line that names the value and the remedy."""

_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


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


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device, or the machine, had too little memory for what an exception or its cause ended."""
    import torch  # not above: these errors are also raised where torch is not needed

    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


def is_refusal(error: Exception) -> bool:
    """Whether the prompt may be at fault for an error of a base's forward: pixels and placeholders that do not match, say."""
    kinds = (ValueError, RuntimeError, IndexError, StopIteration)
    return isinstance(error, kinds) and not isinstance(error, TwigVLMError) and not is_out_of_memory(error)


def one_line(error: Exception) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
