"""Limits of a server, as a frozen dataclass; the command line's options are generated from it."""

from dataclasses import dataclass, fields
from math import isfinite

from twigvlm.errors import TwigVLMError


@dataclass(frozen=True)
class Limits:
    """Limits that bound a server's memory and the time of a request, whatever is sent to it."""

    max_rows: int = 16
    """Largest number of answers that are generated together; a single request may ask for more with `n`."""
    max_waiting: int = 64
    """Largest number of waiting requests; further ones are refused with status 429."""
    max_tokens: int = 1024
    """Longest answer, in tokens; also the default for requests that give none."""
    max_choices: int = 8
    """Largest `n` of a request."""
    max_images: int = 16
    """Largest number of images in a request."""
    max_pixels: int = 16_000_000
    """Largest image, in pixels (width times height)."""
    max_request_pixels: int = 64_000_000
    """Largest total of the images of a request, in pixels."""
    max_body: int = 20_000_000
    """Largest body of a request, in bytes."""
    max_held: int = 2_000_000_000
    """Largest total size of bodies and prepared images of all requests, in bytes; further requests are refused with status 429.
    A single request may exceed it."""
    prefix_bytes: int = 500_000_000
    """Largest total size, in bytes, of what is kept of earlier prompts, so that requests that begin as they do, such as the next
    turns of a conversation, compute only what is new. 0: nothing is kept."""
    upload_seconds: float = 60.0
    """Seconds within which a request must have arrived."""
    waiting_seconds: float = 60.0
    """Seconds that a request may wait; then it is refused with status 429."""
    total_seconds: float = 600.0
    """Seconds that a request may take, including its waiting."""

    @property
    def longest_wait(self) -> float:
        """Seconds that a request may wait: `waiting_seconds`, but no more than `total_seconds`."""
        return min(self.waiting_seconds, self.total_seconds)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low = 0 if field.name in ("max_waiting", "prefix_bytes") else 1
            if isinstance(value, float) and not (value > 0 and isfinite(value)):
                raise TwigVLMError(f"{field.name}={value:g}: must be more than 0")
            if isinstance(value, int) and value < low:
                raise TwigVLMError(f"{field.name}={value}: must be {low} or more")
