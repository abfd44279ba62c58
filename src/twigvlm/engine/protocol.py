"""What an engine asks of the runner of its rows."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from twigvlm.engine.row import Row
from twigvlm.speculation.batch import Batch
from twigvlm.speculation.draft import Draft


class Step(NamedTuple):
    """What a step brought each row."""

    tokens: list[list[int]]
    """Accepted drafted tokens, and one of the base's own."""
    drafted: list[int]
    """Tokens that were drafted."""


@runtime_checkable
class Runner(Protocol):
    """The rows of an engine on the device. Row i of every part is row i of the cache."""

    batch: Batch

    def prefill(self, rows: Sequence[Row]) -> Step:
        """Take up rows whose prompts lie in one batch and are cut at the same layers; their first tokens.

        Raises:
            TwigVLMError: a prompt ends with a visual token that pruning may drop. No row has been taken up then.
        """

    def draft(self) -> Draft:
        """Draft after the newest tokens of all rows."""

    def verify(self, draft: Draft) -> Step:
        """Let the base choose along the drafts, and keep what it agrees with."""

    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
