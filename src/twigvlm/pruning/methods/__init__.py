"""Ways to choose visual tokens, one file each, and the published methods by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import Pruner
from twigvlm.pruning.methods.cdpruner import CDPruner
from twigvlm.pruning.methods.dart import Dart
from twigvlm.pruning.methods.divprune import DivPrune
from twigvlm.pruning.methods.fastervlm import FasterVLM
from twigvlm.pruning.methods.fastv import FastV
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

METHODS: Final[Mapping[str, Callable[..., Pruner]]] = {
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "sparsevlm-v2": partial(SparseVLM, "v2"),
    "mustdrop": MustDrop,
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


def make_pruner(name: str, seed: int = 0) -> Pruner:
    """A method by name, for example "visionzip", "fastv:3", "random:0", or "visionzip:DIRECTORY" with a tuned projector.

    Args:
        name: as `twigvlm methods` lists it.
        seed: of a random choice.

    Raises:
        TwigVLMError: there is no such method, or it takes no layer.
    """
    method, colon, layer = name.partition(":")
    if reads_files(name):
        return VisionZip(projector=layer)
    if method not in METHODS:
        known = ", ".join("random:LAYER" if known == "random" else known for known in METHODS)
        raise TwigVLMError(f"pruner {name!r}: must be one of twig, {known}")
    if not colon and method == "random":
        raise TwigVLMError("pruner 'random': needs the layer to cut after, for example random:0 (before the decoder)")
    if not colon:
        return METHODS[method]()
    if method not in _AT_A_LAYER or not layer.isdigit():
        raise TwigVLMError(f"pruner {name!r}: only {', '.join(_AT_A_LAYER)} take a layer, for example fastv:3")
    return RandomTokens(int(layer), seed) if method == "random" else METHODS[method](layer=int(layer))


def reads_files(name: str) -> bool:
    """Whether a method's name says where weights of its own are."""
    method, _, directory = name.partition(":")
    return method == "visionzip" and directory != ""


def described(name: str) -> tuple[str, str, str, str]:
    """A method's name, where it cuts (of a base of 32 layers), what it needs, and its paper."""
    if name == "random":
        return "random:LAYER", "after that layer; 0: before the decoder", "", "the floor that any ranking must beat"
    pruner = make_pruner(name)
    at = [cut.layer for cut in pruner.cuts(192, 576, 32)]
    where = "before the decoder" if at == [0] else f"after {', '.join(map(str, at))} of 32 layers"
    paper = getattr(pruner, "paper", "")
    return name, where, ", ".join(sorted(need.value for need in pruner.needs)), paper
