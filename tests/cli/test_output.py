import io
import re
import threading
from contextlib import redirect_stderr

import pytest

from twigvlm.cli import output


class Heard(io.StringIO):
    """A stream that tells when something was written to it."""

    def __init__(self, terminal=False):
        super().__init__()
        self.wrote, self.terminal = threading.Event(), terminal

    def write(self, text):
        self.wrote.set()
        return super().write(text)

    def isatty(self):
        return self.terminal


@pytest.fixture
def heard(monkeypatch):
    monkeypatch.setattr(output, "INTERVAL", 0.01)
    return Heard()


def test_long_work_says_how_far_it_is_where_stderr_is_no_terminal(heard):
    with redirect_stderr(heard), output.steps("Asking", 4, done=1) as advance:
        advance("Asking: right")
        heard.wrote.clear()
        assert heard.wrote.wait(60)
        advance(count=2)
    lines = heard.getvalue().splitlines()
    assert re.fullmatch(
        r"2/4 Asking: right, \d+:\d\d:\d\d left", next(line for line in lines if line.startswith("2/4"))
    )
    assert lines[-1] == "4/4 Asking: right"


def test_work_of_unknown_length_is_no_silence_either(heard):
    with redirect_stderr(heard), output.busy("Loading llava"):
        assert heard.wrote.wait(60)
    assert re.match(r"Loading llava, for \d+:\d\d:\d\d so far\n", heard.getvalue())


def test_quick_work_is_quiet(capsys):
    with output.busy("Loading"), output.steps("Asking", 1, last_line=False) as advance:
        advance()
    assert capsys.readouterr().err == ""


def test_only_one_of_several_processes_speaks(heard, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(output.threading, "Thread", None)  # which would say how far it is
    with redirect_stderr(heard), output.busy("Loading"), output.steps("Training", 2) as advance:
        advance()
    assert heard.getvalue() == ""


def test_a_terminal_shows_the_time_left(monkeypatch):
    """A narrow one too, whatever else there is to say."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = Heard(terminal=True)
    with redirect_stderr(stream), output.steps("Asking", 400) as advance:
        advance("Asking: " + 20 * "right ", count=200)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"200/400 \d:\d\d:\d\d · [-\d]+:[-\d]{2}:[-\d]{2} left Asking: ", plain)
