"""What a server takes on at most, as a frozen dataclass; the command line's options are made from it."""

from dataclasses import dataclass, fields
from math import isfinite

from twigvlm.errors import TwigVLMError


@dataclass(frozen=True)
class Limits:
    """Limits of a server: whatever is sent to it, its memory and the time of a request stay bounded."""

    max_rows: int = 16
    """Answers that are generated together at most; a single request may ask for more by `n`."""
    max_waiting: int = 64
    """Requests that may wait for a place; further ones are refused with status 429."""
    max_tokens: int = 1024
    """Longest answer, in tokens; also the length of answers whose request gives none."""
    max_choices: int = 8
    """Largest `n` of a request."""
    max_images: int = 16
    """Most images of a request."""
    max_pixels: int = 16_000_000
    """Largest image, in pixels (width times height)."""
    max_body: int = 20_000_000
    """Largest body of a request, in bytes."""
    max_held: int = 2_000_000_000
    """Bodies and prepared images of all requests together, in bytes; further requests are refused with status 429. A request
    alone may exceed it."""
    upload_seconds: float = 60.0
    """Longest time in which a request must have arrived."""
    waiting_seconds: float = 60.0
    """Longest time that a request waits for a place; then it is refused with status 429."""
    total_seconds: float = 600.0
    """Longest time of a request, its waiting included."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low = 0 if field.name == "max_waiting" else 1
            if isinstance(value, float) and not (value > 0 and isfinite(value)):
                raise TwigVLMError(f"{field.name}={value:g}: must be more than 0")
            if isinstance(value, int) and value < low:
                raise TwigVLMError(f"{field.name}={value}: must be {low} or more")
