"""Parse the command line: options and help come from dataclasses; a usage error is one line followed by the usage."""

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from textwrap import dedent
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    MISSING,
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from twigvlm.config import PruningConfig, SpeculationConfig
from twigvlm.errors import TwigVLMError


class UsageError(TwigVLMError):
    """Options that cannot be combined, whatever their values; raised by a command's `__post_init__`."""


_REGISTRY = ConstructorRegistry()
_WITHOUT = re.compile(r"\s*None(?: given)?: ([^.]+)\.")
"""The sentence of a description that says what happens if the option is left out."""
_DEPTH = 2  # words of the longest names of subcommands, such as `evaluate speed`


def parse(commands: Any, description: str, args: Sequence[str]) -> Any:
    """Make the command that the arguments ask for.

    Args:
        commands: a union of dataclasses, one for each subcommand.
        description: description of the program, for its help.
        args: arguments without the program's name.

    Raises:
        TwigVLMError: a value is out of range.
        SystemExit: help was printed (0), or a usage error (2).
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            command = _tyro(commands, description, args)
    except ImportError as error:
        if "--tyro-print-completion" not in args:
            raise
        raise TwigVLMError("completion for this shell needs one more package; run: pip install shtab") from error
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro shows the ValueErrors of nested dataclasses in a box of its own
        cause = stop.__context__
        while cause is not None and not isinstance(cause, TwigVLMError):
            cause = cause.__context__
        if cause is not None and not isinstance(cause, UsageError):
            raise cause from None
        message = str(cause) if cause is not None else _one_line(_printed(commands, description, args)[1])
    else:
        repeated = next(_repeated_lists(command, args), None)
        if repeated is None:
            return command
        message = f"{repeated}: given more than once; give it once, followed by all its values"
    print(f"twigvlm: error: {message}\n{_usage(commands, description, args)}", file=sys.stderr)
    raise SystemExit(2)


def _tyro(commands: Any, description: str, args: Sequence[str]) -> Any:
    return tyro.cli(
        commands,
        prog="twigvlm",
        description=description,
        args=args,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        registry=_REGISTRY,
    )


def _repeated_lists(command: Any, args: Sequence[str]) -> Iterator[str]:
    """Options with several values that are given twice, of which tyro would only keep the last values."""
    given = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    kinds = get_type_hints(type(command), include_extras=True)
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            yield from _repeated_lists(value, args)
        elif isinstance(value, tuple):
            aliases = (getattr(extra, "aliases", None) or () for extra in get_args(kinds[field.name])[1:])
            names = {f"--{field.name.replace('_', '-')}", *itertools.chain.from_iterable(aliases)}
            if sum(name in names for name in given) > 1:
                yield next(name for name in given if name in names)


def _printed(commands: Any, description: str, args: Sequence[str]) -> tuple[str, str]:
    """What tyro prints on stdout and stderr for these arguments, on a terminal that is wide enough for every line."""
    out, err, before = io.StringIO(), io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
            _tyro(commands, description, args)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return out.getvalue(), err.getvalue()


def _usage(commands: Any, description: str, args: Sequence[str]) -> str:
    """The usage of the subcommand that the arguments begin with, or of the program if they name none."""
    words = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))[:_DEPTH]
    while True:  # what follows the subcommand are values, for which tyro would leave out of the usage what they are
        usage = _printed(commands, description, [*words, "--help"])[0].partition("\n\n")[0].strip()
        if not words or usage.startswith(" ".join(("usage: twigvlm", *words))):
            return usage
        words.pop()


def _one_line(box: str) -> str:
    """The text in the box of a usage error, without its title, its border, and the part that repeats the help."""
    rows = [re.sub(r"^[│ ] ?|[│\s]*$", "", row) for row in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]]
    ruled = itertools.groupby(rows, key=lambda row: re.fullmatch("[─-]{2,}|╰.*|", row) is None)
    parts = [list(part) for is_text, part in ruled if is_text] or [[]]

    def indented(start: str) -> list[str]:
        """The entries of the part that begins with `start`, without their descriptions."""
        found = next((part[1:] for part in parts if part and part[0].startswith(start)), [])  # less the heading
        return [row.strip() for row in found if re.match(r" {4}\S", row)]

    if missing := indented("Missing from"):
        unknown = indented("Unrecognized options")
        return f"required: {', '.join(missing)}" + (f"; unrecognized: {', '.join(unknown)}" if unknown else "")
    text = " ".join(" ".join(parts[0]).split())
    if near := indented("Perhaps you meant"):
        text += f"; perhaps you meant {near[0].split()[0].rstrip(',')}"
    if option := indented("Argument helptext"):
        values = re.search(r"'.*'", text)
        text = f"{option[0]}: {f'{values[0]} does not fit' if values else text.partition(': ')[2]}"
    if choice := re.match(r"(?i)invalid choice ('.*') for argument '(\S+)'\. Expected one of \((.*)\)", text):
        allowed = sorted(set(re.findall(r"'(\w+)'", choice[3])) - {"None"})  # tyro's order changes from run to run
        text = f"{choice[2]} {choice[1]}: must be one of {', '.join(allowed)}"
    if text.startswith("Expected one of"):
        text = f"no subcommand given; {text.lower()}"
    return text[0].lower() + text[1:] if text else "the options do not fit"


@_REGISTRY.struct_rule
def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The fields of one of our dataclasses as options: required ones first, then its own before inherited ones."""
    if not (dataclasses.is_dataclass(info.type) and info.type.__module__.startswith("twigvlm.")):
        return None
    kinds = get_type_hints(info.type, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(info.type)}
    order = dict.fromkeys(name for cls in info.type.__mro__ for name in inspect.get_annotations(cls) if name in fields)
    defaults = {name: _default(fields[name], info.default) for name in order}
    specs = []
    for name, default in sorted(defaults.items(), key=lambda item: item[1] is not MISSING_NONPROP):
        kind, text = _helped(kinds[name], describe(info.type, name), default)
        specs.append(StructFieldSpec(name, kind, default, text))
    return StructConstructorSpec(info.type, tuple(specs))


def _default(field: dataclasses.Field[Any], instance: Any) -> Any:
    """A field's default, from an instance of its class if there is one."""
    if instance not in (None, MISSING, MISSING_NONPROP):
        return getattr(instance, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    return MISSING_NONPROP if field.default_factory is dataclasses.MISSING else field.default_factory()


def _helped(kind: Any, text: str, default: Any) -> tuple[Any, str]:
    """An option's type with hints for its help, and its description.

    For an option with the default `None`, the help shows what that means instead of `None`.
    """
    plain, *extras = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    choices = [choice for choice in get_args(plain) if choice is not NoneType]
    optional, metavar, hint = len(choices) < len(get_args(plain)), None, None
    if isinstance(default, bool):
        hint = "(default: on; this switches it off)" if default else "(default: off)"
    elif default is None or default == ():
        words = _WITHOUT.search(text)
        hint = f"(default: {words[1]})" if words else "(optional)"
        metavar = "|".join(map(_metavar, choices)) if optional else None
    if hint is not None or not (optional or isinstance(default, tuple)):
        text = _WITHOUT.sub("", text).strip()
    mine = tyro.conf.arg(metavar=metavar, help_behavior_hint=hint)
    return Annotated[(plain, mine, *extras)], text


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) is tuple:
        return f"[{_metavar(get_args(kind)[0])} ...]"
    return str(kind.__name__).upper()


def describe(owner: type, name: str) -> str:
    """The help text of an option: its docstring, or that of the option of this name in `twigvlm.config`."""
    for cls in (*owner.__mro__, PruningConfig, SpeculationConfig):
        if dataclasses.is_dataclass(cls) and name in _docstrings(cls):
            return _docstrings(cls)[name]
    return ""


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a class, each as one paragraph."""

    def found() -> Iterator[tuple[str, str]]:
        (tree,) = ast.parse(dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                yield field.target.id, " ".join(str(ast.literal_eval(below.value)).split())

    return dict(found())
