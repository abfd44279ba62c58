"""Ways to prune by the names that evaluations take, parsed into one description that all evaluations use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twigvlm.config import check_coverage
from twigvlm.errors import TwigVLMError
from twigvlm.model import TwigVLM
from twigvlm.pruning.cut import Need
from twigvlm.pruning.methods import METHODS, make_pruner
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.methods.random import RandomScores
from twigvlm.pruning.methods.twig_attention import TwigAttention
from twigvlm.pruning.view import Scorer

Ranking = Literal["none", "published", "twig", "attention", "twig-text", "random", "deep"]


@dataclass(frozen=True)
class Method:
    """A way to prune, as `parse_method` reads it from its name."""

    name: str
    """The name that it was read from."""
    ranking: Ranking
    """What ranks the visual tokens at the twig's cuts. none: nothing is pruned. published: a method of `METHODS`, with its own
    cuts."""
    diverse: bool = False
    """Whether the kept tokens must also differ from each other."""
    scout: bool = False
    """Whether the tokens are ranked before the decoder."""
    refocus: float | None = None
    """τ of a method that chooses the kept tokens again while the answer grows; None: they stay the same."""
    layers: tuple[int, int | None] = (0, None)
    """For deep: the base layer whose attention ranks, counted from 1, and the last one if it is a mean over several layers."""

    @property
    def has_own_cuts(self) -> bool:
        """Whether the method cuts at layers of its own, so that neither K_f nor φ applies."""
        return self.scout or self.ranking == "published"

    @property
    def needs_twig(self) -> bool:
        """Whether it uses a twig's cuts or ranking."""
        return self.ranking not in ("none", "published")

    @property
    def is_random(self) -> bool:
        """Whether each question draws its tokens at random."""
        return self.name.partition(":")[0] == "random"

    def check(self, model: TwigVLM) -> None:
        """Raise TwigVLMError if the name has a layer that the base lacks, or options that a published method does not take."""
        if self.ranking == "published":
            make_pruner(self.name)
        elif self.ranking != "none":
            self.scorer(model, seed=0)

    def scorer(self, model: TwigVLM, seed: int) -> Scorer:
        """The scorer that ranks the visual tokens at the twig's cuts.

        Args:
            model: the base with its twig.
            seed: seed of the random choice.

        Raises:
            TwigVLMError: the method has no such ranking, or names a layer that the base does not have.
        """
        if self.ranking == "twig":
            return default_scorer(model.twig)
        if self.ranking == "random":
            return RandomScores(seed)
        if self.ranking == "deep":
            first, last = self.layers
            layers = model.base.num_layers
            if not 1 <= first <= (first if last is None else last) <= layers:
                raise TwigVLMError(
                    f"method {self.name!r}: the layers must be 1 to {layers}, those of this base, in ascending order"
                )
            return BaseLayerAttention(first, through=last)
        if self.ranking in ("none", "published"):
            raise TwigVLMError(
                f"method {self.name!r}: has no ranking under the twig's cuts; use one that ranks, such as twig"
            )
        return TwigAttention("text" if self.ranking == "twig-text" else "last")

    def options(self, model: TwigVLM, final_wipe: int | None, final_share: float | None, seed: int) -> dict[str, Any]:
        """Arguments of `TwigVLM.generate` that prune by this method, except for the budget.

        Args:
            model: the model that answers.
            final_wipe: K_f; None: the twig's own.
            final_share: φ; None: the twig's own.
            seed: seed of the random choice.
        """
        if self.ranking == "none":
            return {}
        if self.ranking == "published":
            return {"pruner": make_pruner(self.name, seed)}
        how: dict[str, Any] = {"scout": True} if self.scout else {"final_wipe": final_wipe, "final_share": final_share}
        if self.refocus is not None:
            how["refocus"] = self.refocus
        if self.diverse:
            how["diverse"] = True
        return how if self.ranking == "twig" else {**how, "scorer": self.scorer(model, seed)}


_PLAIN = {
    method.name: method
    for method in (
        Method("none", "none"),
        Method("twig", "twig"),
        Method("diverse", "twig", diverse=True),
        Method("scout", "twig", scout=True),
        Method("diverse+scout", "twig", diverse=True, scout=True),
        Method("attention", "attention"),
        Method("twig-text", "twig-text"),
        Method("random", "random"),
    )
}
NAMES = (*_PLAIN, "refocus:τ", "diverse+refocus:τ", "deep:N", "deep:N-M")
"""Names in addition to those of published methods; `twigvlm methods` explains each of them."""


def parse_method(name: str) -> Method:
    """Parse the name of a method: one of `NAMES`, or a published method with its options after colons.

    Raises:
        TwigVLMError: there is no such method, or τ is missing or out of range.
    """
    if name in _PLAIN:
        return _PLAIN[name]
    way, _, given = name.partition(":")
    if way in METHODS:
        return Method(name, "published")
    if way in ("refocus", "diverse+refocus"):
        return Method(name, "twig", diverse=way != "refocus", refocus=_coverage(name, way, given))
    first, dash, last = given.partition("-")
    if way == "deep" and first.isdecimal() and (last.isdecimal() or not dash):
        return Method(name, "deep", layers=(int(first), int(last) if dash else None))
    raise TwigVLMError(f"method {name!r}: must be one of {', '.join(NAMES)}, or published; see 'twigvlm methods'")


def parse_methods(model: TwigVLM, names: Sequence[str]) -> list[Method]:
    """Parse the names of methods, and check that each of them can prune this base.

    Raises:
        TwigVLMError: a name is unknown, names a layer that the base does not have, or takes no such option; or methods rank
            by the vision tower's attention, which this base does not assign to visual tokens. All of those are named.
    """
    methods = [parse_method(name) for name in names]
    for method in methods:
        method.check(model)
    pooled = [method.name for method in methods if _ranks_by_tower(method)] if model.base.family.tower.pools else []
    if pooled:
        rest = [method.name for method in methods if method.name not in pooled and method.ranking != "none"]
        instead = f"leave them out, and ask for {' '.join(rest)}" if rest else "choose divprune, cdpruner or fastv"
        raise TwigVLMError(
            f"methods={' '.join(pooled)}: need the vision tower's attention to each visual token, which is not known where a "
            f"base pools patches after its tower, as {model.base.family.name} does; {instead}"
        )
    return methods


def _ranks_by_tower(method: Method) -> bool:
    return method.ranking == "published" and Need.TOWER_ATTENTION in make_pruner(method.name).needs


def _coverage(name: str, way: str, given: str) -> float:
    try:
        threshold = float(given)
    except ValueError:
        raise TwigVLMError(f"method {name!r}: must name τ, for example {way}:0.7") from None
    check_coverage(threshold)
    return threshold
