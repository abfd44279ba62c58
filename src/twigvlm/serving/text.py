"""The text of one answer while its tokens arrive, up to a stop text."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

_BROKEN = "\ufffd"  # what a decoder shows for a character of which bytes are missing


@dataclass(frozen=True)
class Piece:
    """Text that one token added. A character that takes several tokens belongs to the last of them."""

    text: str
    drafted: bool
    """Whether the twig drafted the token; otherwise the base chose it."""


class AnswerText:
    """Turns tokens into text, and finds where the answer ends.

    Args:
        decode: turns token ids into text, without special tokens.
        eos: token ids that end an answer and are not part of it.
        stops: texts that end the answer and are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], eos: Collection[int], stops: Sequence[str] = ()) -> None:
        self._decode, self._eos, self._stops = decode, eos, tuple(stops)
        self._ids: list[int] = []
        self._start, self._read = 0, 0  # ids before `_start` do not change how later ones are written
        self._held: list[Piece] = []
        """Text that is held back, because a stop text may begin in it."""
        self.tokens, self.accepted = 0, 0
        """Number of tokens of the answer, end token included, and how many of them were accepted drafts."""
        self.stopped = False
        """Whether the answer ended by itself: by a stop text or an end token."""
        self.cut = False
        """Whether a stop text was found, so that no further token is needed."""

    def push(self, tokens: Sequence[tuple[int, bool]], finished: bool) -> list[Piece]:
        """The text that new tokens add.

        Args:
            tokens: pairs of a token id and whether it was drafted.
            finished: whether these are the last tokens of the answer.
        """
        for token, drafted in tokens:
            if self.cut:
                break
            self.tokens, self.accepted = self.tokens + 1, self.accepted + drafted
            if token in self._eos:
                self.stopped = True
                continue
            self._ids.append(token)
            if text := self._next(whole=False):
                self._held.append(Piece(text, drafted))
                self._cut_at_stop()
        if finished and not self.cut and (rest := self._next(whole=True)):
            self._held.append(Piece(rest, bool(tokens) and tokens[-1][1]))
            self._cut_at_stop()
        return self._release(finished or self.cut)

    def _next(self, whole: bool) -> str:
        """Text that the ids since the last call add; empty while a character is incomplete, unless `whole` asks for the rest."""
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith(_BROKEN) and not whole):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _cut_at_stop(self) -> None:
        text = "".join(piece.text for piece in self._held)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = _first(self._held, min(found))
            self.stopped = self.cut = True

    def _release(self, everything: bool) -> list[Piece]:
        """Remove and return the held text in which no stop text can begin any more."""
        if everything or not self._stops:
            released, self._held = self._held, []
            return released
        text = "".join(piece.text for piece in self._held)
        held = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        released = _first(self._held, len(text) - held)
        self._held = _rest(self._held, len(text) - held)
        return released


def _first(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The pieces up to the first `count` characters."""
    found: list[Piece] = []
    for piece in pieces:
        if count <= 0:
            break
        found.append(Piece(piece.text[:count], piece.drafted))
        count -= len(piece.text)
    return found


def _rest(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The pieces after the first `count` characters."""
    found: list[Piece] = []
    for piece in pieces:
        if text := piece.text[max(count, 0) :]:
            found.append(Piece(text, piece.drafted))
        count -= len(piece.text)
    return found
