"""Ways to choose visual tokens, one in each file, and the published methods by name."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Final

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Pruner
from twigvlm.pruning.methods.cdpruner import CDPruner
from twigvlm.pruning.methods.dart import Dart
from twigvlm.pruning.methods.divprune import DivPrune
from twigvlm.pruning.methods.fastervlm import FasterVLM
from twigvlm.pruning.methods.fastv import FastV
from twigvlm.pruning.methods.fitprune import SCHEDULE, FitPrune
from twigvlm.pruning.methods.holov import HoloV
from twigvlm.pruning.methods.mustdrop import MustDrop
from twigvlm.pruning.methods.prumerge import PruMerge
from twigvlm.pruning.methods.prunesid import PruneSID
from twigvlm.pruning.methods.pyramiddrop import PyramidDrop
from twigvlm.pruning.methods.random import RandomTokens
from twigvlm.pruning.methods.scope import Scope
from twigvlm.pruning.methods.sparsevlm import SparseVLM
from twigvlm.pruning.methods.visionzip import VisionZip
from twigvlm.pruning.methods.vispruner import VisPruner
from twigvlm.pruning.projector import WEIGHTS

METHODS: Final[Mapping[str, Callable[..., Pruner]]] = {
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "sparsevlm-v2": partial(SparseVLM, "v2"),
    "mustdrop": MustDrop,
    "fitprune": FitPrune.load,
    "visionzip": VisionZip,
    "fastervlm": FasterVLM,
    "divprune": DivPrune,
    "scope": Scope,
    "dart": Dart,
    "vispruner": VisPruner,
    "cdpruner": CDPruner,
    "prunesid": PruneSID,
    "holov": HoloV,
    "prumerge+": PruMerge,
    "random": RandomTokens,
}
"""Published methods that need no trained twig. Those in `_AT_A_LAYER` take the layer of their cut after a colon."""
_AT_A_LAYER = ("dart", "fastv", "random")
_NEEDED = {"random": "LAYER", "fitprune": "DIRECTORY"}
"""Methods that cannot do without what is given after the colon."""
_CHOICES = {"compacted": "positions", "published": "accounting"}
"""Words that a name may have after a colon, and the option of the method that they are a value of."""
_REFUSED = {
    "compacted": "was not published with other positions",
    "published": "counts its budget in one way only",
}
"""What is said of a method that does not have the option."""
_FILES = {"visionzip": WEIGHTS, "fitprune": SCHEDULE}
"""What lies in the directory that a name may give."""


def make_pruner(name: str, seed: int = 0) -> Pruner:
    """A method by its name, with what it takes after colons.

    For example "visionzip", "fastv:3" (the layer of its cut), "random:0", "visionzip:DIRECTORY" (a tuned projector),
    "fitprune:DIRECTORY" (a calibrated schedule), "visionzip:compacted" (positions as published),
    "sparsevlm:published:compacted" (and the budget as its authors count it).

    Args:
        name: as `twigvlm methods` lists it.
        seed: seed of a random choice.

    Raises:
        TwigVLMError: there is no such method, or it does not take what is given.
    """
    method, *words = name.split(":")
    if method not in METHODS:
        raise TwigVLMError(f"pruner {name!r}: must be one of twig, {', '.join(map(listed, METHODS))}")
    options: dict[str, Any] = {_CHOICES[word]: word for word in words if word in _CHOICES}
    others = [word for word in words if word not in _CHOICES]
    given = ":".join(others)
    if "" in words and method not in _NEEDED:
        raise TwigVLMError(f"pruner {name!r}: nothing follows a colon; leave the colon out")
    if method == "random":
        options["seed"] = seed
        if not given:
            raise TwigVLMError(
                "pruner 'random': needs the layer to cut after, for example random:0 (before the decoder)"
            )
    if method == "fitprune":
        if not given:
            raise TwigVLMError(
                "pruner 'fitprune': needs the directory of a schedule, for example fitprune:runs/schedule; make one with "
                "'twigvlm train fitprune'"
            )
        options["folder"] = given
    elif given and method == "visionzip":
        options["projector"] = given
    elif given and method in _AT_A_LAYER:
        if not given.isdecimal():
            raise TwigVLMError(f"pruner {name!r}: {given!r} is not a layer; give its number, for example {method}:3")
        options["layer"] = int(given)
    elif others:
        raise TwigVLMError(
            f"pruner {name!r}: takes no layer; give one only to {', '.join(_AT_A_LAYER)}, for example fastv:3"
        )
    taken = signature(METHODS[method]).parameters
    refused = [word for word in _CHOICES if word in words and _CHOICES[word] not in taken]
    if refused:
        reasons = " and ".join(_REFUSED[word] for word in refused)
        raise TwigVLMError(f"pruner {name!r}: {method} {reasons}; leave out {' and '.join(refused)}")
    return METHODS[method](**options)


def pruner_by_name(pruner: Pruner | str | None) -> Pruner | None:
    """The method that a name or an object stands for; None: the twig's own. Raises TwigVLMError if it is no method."""
    if isinstance(pruner, str):
        return None if pruner == "twig" else make_pruner(pruner)
    if pruner is not None and (isinstance(pruner, type) or not isinstance(pruner, Pruner)):
        name = pruner.__name__ if isinstance(pruner, type) else repr(pruner)
        raise TwigVLMError(
            f"pruner={name}: is no pruning method; give one by name, for example 'fastv', or an instance"
        )
    return pruner


def reads_files(name: str) -> bool:
    """Whether a method's name holds the directory of a file that the method reads."""
    return _method_file(name) is not None


def method_files(names: Iterable[str | None]) -> dict[str, str]:
    """By the names of those methods that read a file, twelve hexadecimal digits that change with what the file holds."""
    paths = {name: _method_file(name) for name in names if name is not None}
    found = {name: path.read_bytes() for name, path in paths.items() if path is not None and path.is_file()}
    return {name: hashlib.sha256(data).hexdigest()[:12] for name, data in found.items()}


def _method_file(name: str) -> Path | None:
    method, *words = name.split(":")
    folder = ":".join(word for word in words if word not in _CHOICES)
    return Path(folder) / _FILES[method] if folder and method in _FILES else None


def listed(method: str) -> str:
    """A name of `METHODS` with what must be given after a colon."""
    return f"{method}:{_NEEDED[method]}" if method in _NEEDED else method


def described(name: str) -> tuple[str, str, str, str]:
    """A method's name as `listed` gives it, where it cuts a base of 32 layers, what it looks at, and its paper."""
    if name == "random":
        return listed(name), "after that layer; 0: before the decoder", "", "the floor that any ranking must beat"
    if name == "fitprune":
        return listed(name), "after every layer", "a schedule: twigvlm train fitprune", FitPrune.paper
    pruner = make_pruner(name)
    at = [cut.layer for cut in pruner.cuts(192, 576, 32)]
    where = "before the decoder" if at == [0] else f"after {', '.join(map(str, at))} of 32 layers"
    paper = getattr(pruner, "paper", "")
    return name, where, ", ".join(sorted(need.value for need in pruner.needs)), paper
