"""The paper's figures, to be shown next to measured ones.

Source: Table 1 of arXiv 2503.14075 v3: RelAcc in percent of LLaVA-1.5-7B (576 visual tokens), the mean over GQA, MMBench,
MME, TextVQA, ScienceQA-IMG and VQAv2, by R̄.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Final

from twigvlm.evaluation.variants import Variant
from twigvlm.pruning.methods import METHODS, make_pruner, reads_files

REL_ACC: Final[Mapping[str, Mapping[float, float]]] = {
    "fastv": {192: 96.5, 128: 92.2, 64: 77.0},
    "sparsevlm": {192: 95.7, 128: 93.2, 64: 89.9},
    "pyramiddrop": {192: 96.5, 128: 95.1, 64: 87.6},
    "fastervlm": {64: 89.1},
    "mustdrop": {192: 96.6, 128: 95.1, 64: 89.6},
    "visionzip": {192: 97.4, 128: 96.1, 64: 93.3},
    "visionzip:": {192: 98.3, 128: 97.3, 64: 95.2},
    "attention": {192: 99.2, 128: 98.7, 64: 96.0},
    "twig": {192: 99.6, 128: 99.2, 64: 97.7},
}
"""RelAcc in percent by method and R̄. `attention` is the first TwigVLM, `twig` with a P-Head is TwigVLM++, `visionzip:` is
VisionZip‡."""

TRUE_BUDGETS: Final[Mapping[str, Mapping[float, float]]] = {"sparsevlm": {192: 206.5, 128: 145.4, 64: 82.2}}
"""R̄ by this project's rule (`docs/methods.md`), for methods whose authors count in another way."""
_COUNTED_AFTER_CUTS = ("mustdrop",)
"""Methods whose authors count a layer with what the cut behind it leaves, and average over data: their R̄ is not known."""


def published(variant: Variant, pruning_head: bool) -> str:
    """The published RelAcc in percent as text, with its R̄ if that differs; empty if nothing was published.

    Args:
        variant: a method under a budget.
        pruning_head: whether the twig has a P-Head, without which `twig` is the first TwigVLM.
    """
    method = "attention" if variant.method == "twig" and not pruning_head else published_name(variant.method)
    if variant.retain is None or variant.retain not in REL_ACC.get(method, {}):
        return ""
    text = f"{REL_ACC[method][variant.retain]:.1f}"
    budget = TRUE_BUDGETS.get(method, {}).get(variant.retain)
    if method in _COUNTED_AFTER_CUTS:
        return f"{text} (counted after cuts)"
    return text if budget is None else f"{text} (R̄ {budget:.1f})"


def published_name(method: str) -> str:
    """The key of `REL_ACC` with a method's figures; the name itself if the method has other settings than the published one.

    Positions, the way to count a budget, and spelled-out defaults are not other settings: `visionzip:compacted`,
    `sparsevlm:published` and `fastv:2` are shown with the figures of `visionzip`, `sparsevlm` and `fastv`.
    """
    name = method.partition(":")[0]
    if name not in REL_ACC or name not in METHODS:
        return method
    if reads_files(method):
        return f"{name}:"
    given, default = make_pruner(method), make_pruner(name)
    names = [field.name for field in fields(given) if field.name not in ("positions", "accounting")]  # type: ignore[arg-type]
    return name if all(getattr(given, one) == getattr(default, one) for one in names) else method
