"""What the paper reports, to stand beside what is measured here.

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
"""By the method's name here; `attention` is the first TwigVLM, `twig` with a P-Head TwigVLM++, `visionzip:` VisionZip‡."""

TRUE_BUDGETS: Final[Mapping[str, Mapping[float, float]]] = {"sparsevlm": {192: 206.5, 128: 145.4, 64: 82.2}}
"""R̄ by the rule of this project (`docs/methods.md`), where authors count in another way."""


def published(variant: Variant, pruning_head: bool) -> str:
    """The published RelAcc in percent, with its R̄ where that is another one; empty if there is none.

    Args:
        variant: a method under a budget.
        pruning_head: whether the twig has a P-Head, without which `twig` is the first TwigVLM.
    """
    method = "attention" if variant.method == "twig" and not pruning_head else published_name(variant.method)
    if variant.retain is None or variant.retain not in REL_ACC.get(method, {}):
        return ""
    text = f"{REL_ACC[method][variant.retain]:.1f}"
    budget = TRUE_BUDGETS.get(method, {}).get(variant.retain)
    return text if budget is None else f"{text} (R̄ {budget:.1f})"


def published_name(method: str) -> str:
    """The key of `REL_ACC` that a method's figures stand under; the name itself where it has another setting.

    Positions and the way to count a budget make no other setting, so that figures stand beside `visionzip:compacted` and
    `sparsevlm:published` too, nor does a default that is spelled out, as in `fastv:2`.
    """
    name = method.partition(":")[0]
    if name not in REL_ACC or name not in METHODS:
        return method
    if reads_files(method):
        return f"{name}:"
    given, default = make_pruner(method), make_pruner(name)
    names = [field.name for field in fields(given) if field.name not in ("positions", "accounting")]  # type: ignore[arg-type]
    return name if all(getattr(given, one) == getattr(default, one) for one in names) else method
