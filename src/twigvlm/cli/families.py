"""`twigvlm families`: which models a twig can grow on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Families:
    """List the supported model families, with notes on each."""

    def run(self) -> None:
        """Print the tables on stdout."""
        from rich.table import Column, Table

        from twigvlm.base.families import FAMILIES, LANGUAGE_MODELS
        from twigvlm.cli.output import Printer

        def table(*headers: str) -> Table:
            return Table(*(Column(header, overflow="fold") for header in headers))

        families = table("family", "model_type", "takes", "notes")
        for family in FAMILIES:
            takes = ", ".join(f"{visual.kind}s" for visual in family.visuals)
            families.add_row(family.name, family.model_type, takes, family.notes)
        inside = table("language model inside", "notes")
        for language_model in LANGUAGE_MODELS:
            inside.add_row(language_model.model_type, language_model.notes)
        console = Printer()
        console.print(families)
        console.print(inside)
