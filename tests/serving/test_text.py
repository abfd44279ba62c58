"""Tokens to text, and stop texts: however the tokens come, the text is the same."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from twigvlm.serving.text import AnswerText

EOS = 0
BYTES = {number: bytes([number]) for number in range(1, 256)}


def decode(ids):
    return b"".join(BYTES[token] for token in ids).decode(errors="replace")


def run(ids, cuts, stops, drafted=lambda place: place % 2 == 0):
    text = AnswerText(decode, {EOS}, stops)
    pieces, borders = [], [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for start, end in pairwise(borders):
        if not text.cut:
            pieces += text.push([(ids[at], drafted(at)) for at in range(start, end)], finished=end == len(ids))
    return text, pieces


texts = st.text(st.sampled_from("ab é😀"), max_size=20)


@given(texts, st.lists(st.integers(0, 50), max_size=6), st.lists(st.text("ab é😀", min_size=1, max_size=3), max_size=3))
def test_stop_texts_cut_where_they_begin(answer, cuts, stops):
    ids = list(answer.encode())
    found, pieces = run(ids, cuts, stops)
    got = "".join(piece.text for piece in pieces)
    ends = [at for stop in stops if (at := answer.find(stop)) >= 0]
    if ends:
        assert found.cut
        assert answer.startswith(got)
        # A longer stop text may begin earlier than a shorter one that is complete before it.
        assert any(answer[len(got) :].startswith(stop) for stop in stops)
    else:
        assert got == answer
        assert not found.cut
        assert found.tokens == len(ids)
        assert found.accepted == (len(ids) + 1) // 2
        if answer.isascii() and not stops:
            assert all(piece.drafted == (at % 2 == 0) for piece, at in zip(pieces, starts(pieces), strict=True))


def starts(pieces):
    """Where each piece begins in the answer."""
    return [sum(len(piece.text) for piece in pieces[:number]) for number in range(len(pieces))]


@given(texts, st.lists(st.integers(0, 50), max_size=6))
def test_broken_characters_are_shown_at_the_end(answer, cuts):
    ids = [*answer.encode(), 0xF0, 0x9F, EOS]
    found, pieces = run(ids, cuts, ())
    assert "".join(piece.text for piece in pieces) == answer + "\ufffd"
    assert found.stopped
    assert found.tokens == len(ids)


def test_a_stop_text_never_shows_in_part():
    text = AnswerText(decode, {EOS}, ["STOP"])
    assert text.push([(ord(letter), True) for letter in "aST"], False)[0].text == "a"
    assert text.push([(ord("O"), True)], False) == []
    assert "".join(piece.text for piece in text.push([(ord("x"), False)], False)) == "STOx"
    assert text.push([(ord(letter), True) for letter in "STOP!"], False) == []
    assert text.cut
    assert text.stopped
    assert text.tokens == 9
