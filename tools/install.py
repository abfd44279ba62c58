"""Run pip and say on one line how far it is: `python tools/install.py TITLE ARGUMENTS-OF-PIP…`.

On a terminal the line is rewritten as pip goes on. Elsewhere there is one line at the start and one at the end. What pip
itself prints is shown only if it fails.
"""

import re
import subprocess
import sys
import time

COLLECTING = re.compile(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)")
LOADING = re.compile(r"\s*(?:Downloading|Using cached) (?:\S*/)?([\w.]+)-\S+(?: \((.*)\))?")
INSTALLING = re.compile(r"Installing collected packages: (.*)")


class Progress:
    """What pip has said so far, as one line."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.doing = "looking for packages"
        self.lines: list[str] = []
        self._found: set[str] = set()

    @property
    def count(self) -> int:
        """Packages that have been looked at."""
        return len(self._found)

    def read(self, line: str) -> None:
        """Take in a line that pip has printed."""
        self.lines.append(line)
        if found := COLLECTING.match(line):
            self._found.add(found[1].lower())
            self.doing = "looking for packages"
        elif found := LOADING.match(line):
            self.doing = f"fetching {found[1]}" + (f" ({found[2]})" if found[2] else "")
        elif found := INSTALLING.match(line):
            self.doing = f"unpacking {found[1].count(',') + 1} packages"

    def text(self, seconds: float) -> str:
        """The line after some seconds."""
        minutes, rest = divmod(round(seconds), 60)
        return f"{self.title}: {self.doing}, {self.count} found so far, {minutes}:{rest:02}"


def show(title: str, command: list[str]) -> int:
    """Run the command, which prints as pip does, and return its exit code."""
    rewrites, start = sys.stdout.isatty(), time.monotonic()
    progress = Progress(title)
    print(f"{title} …", end="" if rewrites else "\n", flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            progress.read(line)
            if rewrites:
                print(f"\r\x1b[K{progress.text(time.monotonic() - start)[:79]}", end="", flush=True)
    code = process.returncode
    minutes, rest = divmod(round(time.monotonic() - start), 60)
    end = "failed" if code else f"done, {progress.count} packages,"
    print(("\r\x1b[K" if rewrites else "") + f"{title}: {end} after {minutes}:{rest:02}")
    if code:
        sys.stderr.write("".join(progress.lines))
    return code


if __name__ == "__main__":
    sys.exit(show(sys.argv[1], [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *sys.argv[2:]]))
