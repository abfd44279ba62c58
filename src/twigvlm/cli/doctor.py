"""`twigvlm doctor`: what is installed here, what it runs on, and what is missing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices, number formats and extras, and how to install what is missing. Exit code 0 if the core works."""

    def run(self) -> int:
        """Print the tables on stdout. The exit code is 1 if the core does not work."""
        from itertools import groupby

        from rich.table import Column, Table
        from rich.text import Text

        from twigvlm.cli.output import Printer, busy
        from twigvlm.diagnosis import diagnose, works

        with busy("Looking around"):
            findings = diagnose()
        colours = {"ok": "green", "note": "yellow", "missing": "yellow", "broken": "bold red"}
        console = Printer()
        groups = list(dict.fromkeys(finding.group for finding in findings))
        for group, several in groupby(sorted(findings, key=lambda one: groups.index(one.group)), lambda one: one.group):
            table = Table(*(Column(title, overflow="fold") for title in (group, "", "found", "what to do")))
            for one in several:
                table.add_row(one.subject, Text(one.state, colours[one.state]), Text(one.detail), Text(one.remedy))
            console.print(table)
        if works(findings):
            console.print("The core works.")
            return 0
        console.print("The core does not work; the lines above say what to do.")
        return 1
