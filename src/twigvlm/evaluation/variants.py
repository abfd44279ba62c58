"""One question answered under many prunings: forks of one request, which share vision, prompt, trunk, twig and scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from twigvlm.config import check_coverage, check_final_share
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.model import TwigVLM
from twigvlm.pruning.cut import Need, Pruner, average_of, schedule
from twigvlm.pruning.methods import METHODS, make_pruner
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.methods.random import RandomScores
from twigvlm.pruning.methods.scout import ScoutPruner
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.methods.twig_attention import TwigAttention
from twigvlm.pruning.refocus import check_refocus
from twigvlm.pruning.select import best, diverse
from twigvlm.pruning.view import Scorer

RANKINGS = "none, twig, diverse, scout, refocus:τ, diverse+refocus:τ, attention, twig-text, random, deep:N, deep:N-M"
_SCORED = ("twig", "diverse", "scout", "attention", "twig-text", "random")


@dataclass(frozen=True)
class Variant:
    """One way to prune, under one budget."""

    method: str
    """none; twig: the twig's own ranking (its P-Head's where it has one); diverse: by the same ranking, tokens that differ from
    each other; scout: twig before the decoder; refocus:τ, diverse+refocus:τ: twig or diverse, chosen again by the twig's
    ranking while the answer grows; attention, twig-text: last twig layer's attention, of the last or of all text queries;
    random; deep:N: attention of base layer N (counted from 1), deep:N-M: mean attention of layers N to M, oracles that need a
    full pass; or any published method (`twigvlm methods`) with the cuts that are its own."""
    retain: float | None = None
    """R̄, by the same formula for every method; None for none."""
    final_wipe: int | None = None
    """K_f; None for none, for scout, and for methods with cuts of their own."""
    final_share: float = 0.0
    """φ."""

    @property
    def way(self) -> tuple[str, int | None, float]:
        """All but the budget."""
        return self.method, self.final_wipe, self.final_share

    @property
    def name(self) -> str:
        """For example `twig@64/24/0.25`, K_f and φ last, or `visionzip@64`."""
        if self.retain is None:
            return self.method
        if self.final_wipe is None:
            return f"{self.method}@{self.retain:g}"
        share = f"/{self.final_share:g}" if self.final_share else ""
        return f"{self.method}@{self.retain:g}/{self.final_wipe}{share}"


NONE = Variant("none")


def make_variants(
    model: TwigVLM,
    methods: Sequence[str],
    budgets: Sequence[float],
    final_wipes: Sequence[int] = (),
    final_shares: Sequence[float] = (),
) -> list[Variant]:
    """Every method under every budget, K_f and φ (none given: the twig's own), and no pruning.

    Raises:
        TwigVLMError: an unknown method, a layer that the base does not have, or a share that is not in 0..1.
    """
    for method in methods:
        if is_published(method):
            make_pruner(method)
        elif method not in ("none", *_SCORED) and refocus_of(method) is None:
            watched_layers(method, model)
    layers, twig = model.base.num_layers, model.twig.config
    shares = list(final_shares) or [twig.final_share]
    for share in shares:
        check_final_share(share)
    wipes = list(final_wipes) or [layers if twig.final_wipe is None else twig.final_wipe]
    if any(final_shares) and set(wipes) == {layers}:
        raise TwigVLMError(
            "final_share: needs a layer after which tokens leave; give a K_f that is less than the layers too"
        )
    # Without a FinalWipe nothing is left to share.
    ends = list(dict.fromkeys((wipe, 0.0 if wipe == layers else share) for wipe in wipes for share in shares))
    of_method = {method: [(None, 0.0)] if _has_own_cuts(method) else ends for method in methods if method != "none"}
    pruned = [Variant(m, b, *end) for m, own_ends in of_method.items() for b in budgets for end in own_ends]
    if not pruned:
        raise TwigVLMError("nothing to compare: give at least one method that prunes, and one budget")
    for name, given in (("final_wipe", final_wipes), ("final_share", final_shares)):
        if given and all(variant.final_wipe is None for variant in pruned):
            raise TwigVLMError(f"{name}: scout and published methods have their own cuts; leave it out")
    return [NONE, *pruned]


def _has_own_cuts(method: str) -> bool:
    return method == "scout" or is_published(method)


def is_published(method: str) -> bool:
    """Whether a method has cuts of its own; `random` alone ranks under the twig's."""
    return method != "random" and method.partition(":")[0] in METHODS


def refocus_of(method: str) -> float | None:
    """τ of a method that chooses again; None: it does not."""
    name, _, number = method.partition(":")
    if name not in ("refocus", "diverse+refocus"):
        return None
    try:
        threshold = float(number)
    except ValueError:
        raise TwigVLMError(f"method {method!r}: must name τ, for example {name}:0.7") from None
    check_coverage(threshold)
    return threshold


def is_diverse(method: str) -> bool:
    """Whether a method that ranks by the twig keeps tokens that differ from each other."""
    return method.startswith("diverse")


def watched_layers(method: str, model: TwigVLM) -> BaseLayerAttention:
    """The attention of base layers (from 1) that a method ranks by."""
    layers = model.base.num_layers
    name, _, numbers = method.partition(":")
    first, dash, last = numbers.partition("-")
    if name != "deep" or not first.isdecimal() or (dash and not last.isdecimal()):
        raise TwigVLMError(f"method {method!r}: must be one of {RANKINGS}, or of 'twigvlm methods'")
    if not 1 <= int(first) <= int(last or first) <= layers:
        raise TwigVLMError(
            f"method {method!r}: the layers must be 1 to {layers}, those of this base, in ascending order"
        )
    return BaseLayerAttention(int(first), through=int(last) if dash else None)


@dataclass(frozen=True)
class Outcome:
    """What a variant answered."""

    ids: list[int]
    """New ids; the last one is the end token unless the answer was cut."""
    kept: int
    """Visual tokens behind the first cut; M without pruning."""
    average: float
    """R̄ of this prompt."""
    ran: int
    """Visual tokens that were chosen again while the answer grew, and ran through the pruned layers."""


def answer_all(
    model: TwigVLM, inputs: dict[str, Any], variants: Sequence[Variant], max_new_tokens: int, seed: int = 0
) -> dict[str, Outcome]:
    """Answer one prompt greedily under every variant: the answers that one `generate` for each would give.

    What the base's generation config puts between logits and choice, such as a repetition penalty, is applied.

    Args:
        inputs: the processor's outputs for one prompt.
        variants: without repetitions.
        max_new_tokens: longest answer.
        seed: of the random choice.

    Returns:
        Outcomes by the variants' names.

    Raises:
        TwigVLMError: a budget that this prompt cannot have.
    """
    layers, visual = model.base.num_layers, int(model.base.visual_mask(inputs["input_ids"]).sum())
    engine = model.engine()
    # The request that all others are forks of; of methods that rank by the vision tower, if there are any.
    pruners = {variant: _pruner(model, variant, seed) for variant in variants if variant.retain is not None}
    first = next((variant for variant, pruner in pruners.items() if Need.VISION in pruner.needs), NONE)
    how = {} if first is NONE else {"pruner": pruners[first], "retain": first.retain}
    source = engine.add(inputs, **how, max_new_tokens=max_new_tokens, do_sample=False)
    names, kept, averages = {}, {}, {}
    for variant in variants:
        pruner, request = pruners.get(variant), source
        if variant != first:
            request = engine.fork(source, pruner, variant.retain, refocus_of(variant.method))
        cuts = () if pruner is None else schedule(pruner, variant.retain, visual, layers)
        names[request], kept[request] = variant.name, cuts[0].keep if cuts else visual
        averages[request] = average_of(pruner, cuts, visual, layers)
    if source not in names:
        engine.cancel(source)
    rows = {row.id: row for row in engine.waiting}
    ids: dict[int, list[int]] = {request: [] for request in names}
    for event in engine.stream():
        ids[event.id] += event.tokens
    return {
        name: Outcome(ids[request], kept[request], averages[request], sum(look.ran for look in rows[request].looks))
        for request, name in names.items()
    }


def generate_options(model: TwigVLM, variant: Variant, seed: int = 0) -> dict[str, Any]:
    """Arguments of `TwigVLM.generate` that prune as a variant does.

    Args:
        model: that answers.
        variant: from `make_variants`.
        seed: of the random choice.
    """
    if variant.retain is None:
        return {}
    refocus = refocus_of(variant.method)
    if refocus is not None:
        how = {"final_wipe": variant.final_wipe, "final_share": variant.final_share}
        return {"retain": variant.retain, **how, "refocus": refocus, "diverse": is_diverse(variant.method)}
    return {"retain": variant.retain, "pruner": _pruner(model, variant, seed)}


def check_variants(model: TwigVLM, variants: Sequence[Variant], visual: int) -> None:
    """Refuse variants that are impossible for a prompt with this number of visual tokens.

    Raises:
        TwigVLMError: names every such method and the budgets that it could have.
    """
    refusals = []
    for variant in variants:
        if variant.retain is None:
            continue
        try:
            pruner = _pruner(model, variant, 0)
            schedule(pruner, variant.retain, visual, model.base.num_layers)
            refocus = refocus_of(variant.method)
            if refocus is not None:
                check_refocus(refocus, pruner, model.base, model.twig)
        except TwigVLMError as error:
            refusals.append(f"method {variant.method!r}: {one_line(error)}")
    if refusals:
        raise TwigVLMError("; ".join(refusals))


def score_all(
    model: TwigVLM, inputs: dict[str, Any], methods: Sequence[str], seed: int = 0
) -> dict[str, Float[Tensor, "1 tokens"]]:
    """What every method ranks the visual tokens of one prompt by; of no meaning at text tokens.

    Args:
        inputs: the processor's outputs for one prompt.
        methods: of `Variant.method`, without none.
        seed: of the random choice.

    Raises:
        TwigVLMError: an unknown method, or a layer that the base does not have.
    """
    scorers = {method: scorer_of(method, model, seed) for method in methods}
    prefix, layers = PrefixCache(), model.base.num_layers
    for scorer in scorers.values():
        options: dict[str, Any] = {"keep": 1, "final_wipe": layers, "scorer": scorer, "max_new_tokens": 1}
        model.generate(**inputs, **options, do_sample=False, memory=prefix)
    return {method: prefix.scores[scorer] for method, scorer in scorers.items()}


def _pruner(model: TwigVLM, variant: Variant, seed: int) -> Pruner:
    if is_published(variant.method):
        return make_pruner(variant.method, seed)
    if variant.method == "scout":
        return ScoutPruner(model.twig, default_scorer(model.twig))
    final_wipe = model.base.num_layers if variant.final_wipe is None else variant.final_wipe
    select = diverse if is_diverse(variant.method) else best
    scorer = scorer_of(variant.method, model, seed)
    return TwigPruner(scorer, model.twig.config.trunk_layers, final_wipe, variant.final_share, select=select)


def scorer_of(method: str, model: TwigVLM, seed: int) -> Scorer:
    """What a method that ranks under the twig's cuts ranks by.

    Args:
        method: of `Variant.method`, but none that has cuts of its own.
        model: whose twig and layers are meant.
        seed: of the random choice.

    Raises:
        TwigVLMError: an unknown method, or a layer that the base does not have.
    """
    if method not in _SCORED and refocus_of(method) is None:
        return watched_layers(method, model)
    if method in ("twig", "diverse", "scout") or refocus_of(method) is not None:
        return default_scorer(model.twig)
    if method == "random":
        return RandomScores(seed)
    return TwigAttention("text" if method == "twig-text" else "last")
