"""All subcommands of `twigvlm`. Each is a dataclass in a file of its name: the fields are its options, `run` does the work."""

from typing import Annotated

from tyro.conf import subcommand

from twigvlm.cli.batch import Batch
from twigvlm.cli.compare import Compare
from twigvlm.cli.convert import Convert
from twigvlm.cli.demo import Demo
from twigvlm.cli.doctor import Doctor
from twigvlm.cli.evaluate import Evaluate
from twigvlm.cli.export import Export
from twigvlm.cli.families import Families
from twigvlm.cli.figures import Figures
from twigvlm.cli.generate import Generate
from twigvlm.cli.inspect import Inspect
from twigvlm.cli.methods import Methods
from twigvlm.cli.serve import Serve
from twigvlm.cli.train import Train

COMMANDS = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Demo, subcommand("demo")]
    | Annotated[Inspect, subcommand("inspect")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Batch, subcommand("batch")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Figures, subcommand("figures")]
    | Annotated[Families, subcommand("families")]
    | Annotated[Methods, subcommand("methods")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Doctor, subcommand("doctor")]
)
DESCRIPTION = (
    "Make vision-language models answer faster: prune visual tokens and draft\nanswer tokens with one small twig.\n\n"
    "`twigvlm COMMAND --help` lists the options of a command, and\n`twigvlm --version` prints the version."
)
