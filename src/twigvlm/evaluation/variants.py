"""Answer one question under many prunings, by forks of one request that share vision, prompt, trunk, twig and scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from twigvlm.config import PruningConfig, check_final_share
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.evaluation.methods import parse_method, parse_methods
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.model import TwigVLM
from twigvlm.pruning.build import build_pruner
from twigvlm.pruning.cut import Need, Pruner, average_of, schedule
from twigvlm.pruning.refocus import check_refocus


@dataclass(frozen=True)
class Variant:
    """A way to prune under a budget."""

    method: str
    """Name of the method, for `parse_method`."""
    retain: float | None = None
    """R̄, by the same formula for every method; None: nothing is pruned."""
    final_wipe: int | None = None
    """K_f; None without pruning, for scout, and for methods with cuts of their own."""
    final_share: float = 0.0
    """φ."""

    @property
    def way(self) -> tuple[str, int | None, float]:
        """Everything except the budget: method, K_f and φ."""
        return self.method, self.final_wipe, self.final_share

    @property
    def name(self) -> str:
        """For example `visionzip@64`, or `twig@64/24/0.25` with K_f and φ."""
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
    """Every method under every budget, K_f and φ, and the variant without pruning.

    Args:
        model: the base with its twig.
        methods: names of methods, for `parse_method`.
        budgets: values of R̄.
        final_wipes: values of K_f; none: the twig's own.
        final_shares: values of φ; none: the twig's own.

    Raises:
        TwigVLMError: a method is unknown or cannot prune this base, or a share is not in 0..1.
    """
    parsed = parse_methods(model, methods)
    layers, twig = model.base.num_layers, model.twig.config
    shares = list(final_shares) or [twig.final_share]
    for share in shares:
        check_final_share(share)
    wipes = list(final_wipes) or [twig.cut_layers(layers)[1]]
    if any(final_shares) and set(wipes) == {layers}:
        raise TwigVLMError(
            "final_share: needs a layer after which tokens leave; give a K_f that is less than the layers too"
        )
    # Without a FinalWipe nothing is left to share.
    ends = list(dict.fromkeys((wipe, 0.0 if wipe == layers else share) for wipe in wipes for share in shares))
    of_method = {
        method.name: [(None, 0.0)] if method.has_own_cuts else ends for method in parsed if method.ranking != "none"
    }
    retains = dict.fromkeys(budgets)  # one that is named twice is one
    pruned = [Variant(m, b, *end) for m, own_ends in of_method.items() for b in retains for end in own_ends]
    if not pruned:
        raise TwigVLMError("nothing to compare: give at least one method that prunes, and one budget")
    for name, given in (("final_wipe", final_wipes), ("final_share", final_shares)):
        if given and all(variant.final_wipe is None for variant in pruned):
            raise TwigVLMError(f"{name}: scout and published methods have their own cuts; leave it out")
    return [NONE, *pruned]


@dataclass(frozen=True)
class Outcome:
    """The answer of a variant, and its pruning."""

    ids: list[int]
    """New token ids; the last one is the end token unless the answer reached its limit."""
    kept: int
    """Visual tokens after the first cut; M without pruning."""
    average: float
    """R̄ of this prompt."""
    ran: int
    """Visual tokens that refocusing ran through the pruned layers again."""
    looks: int | None
    """How often visual tokens were chosen again; None: the method does not refocus."""
    steps: int
    """Decoding steps of one token each, without the prefill."""


def answer_all(
    model: TwigVLM, inputs: dict[str, Any], variants: Sequence[Variant], max_new_tokens: int, seed: int = 0
) -> dict[str, Outcome]:
    """Answer one prompt greedily under every variant, with the same answers as a `generate` for each would give.

    Logits processors of the base's generation config, such as a repetition penalty, are applied.

    Args:
        model: the base with its twig.
        inputs: the processor's outputs for one prompt.
        variants: variants with different names.
        max_new_tokens: longest answer, in tokens.
        seed: seed of random choices.

    Returns:
        Outcomes by the variants' names.

    Raises:
        TwigVLMError: the prompt cannot have a variant's budget.
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
            request = engine.fork(source, pruner, variant.retain, parse_method(variant.method).refocus)
        cuts = () if pruner is None else schedule(pruner, variant.retain, visual, layers)
        names[request], kept[request] = variant.name, cuts[0].keep if cuts else visual
        averages[request] = average_of(pruner, cuts, visual, layers)
    if source not in names:
        engine.cancel(source)
    rows = {row.id: row for row in engine.waiting}
    ids: dict[int, list[int]] = {request: [] for request in names}
    for event in engine.stream():
        ids[event.id] += event.tokens
    outcomes = {}
    for request, name in names.items():
        row = rows[request]
        outcomes[name] = Outcome(
            ids[request],
            kept[request],
            averages[request],
            sum(look.ran for look in row.looks),
            None if row.refocus is None else len(row.looks),
            len(row.accepted) - 1,
        )
    return outcomes


def named_refusal(
    model: TwigVLM, inputs: dict[str, Any], variants: Sequence[Variant], error: TwigVLMError
) -> TwigVLMError:
    """An error of `answer_all`, with the names of the methods that cannot prune the prompt. Each method is tried alone.

    Args:
        model: the base with its twig.
        inputs: inputs of the prompt.
        variants: variants that should have answered it.
        error: the error, returned unchanged if no method fails alone, or all of them fail for the same reason.
    """
    reasons: dict[str, list[str]] = {}
    for variant in variants:
        try:
            answer_all(model, inputs, [variant], 1)
        except TwigVLMError as refusal:
            reasons.setdefault(one_line(refusal), []).append(variant.method)
    pruning = {variant.method for variant in variants if variant.retain is not None}
    if not reasons or any(pruning <= set(refused) for refused in reasons.values()):
        return error
    named = [(", ".join(map(repr, dict.fromkeys(refused))), reason) for reason, refused in reasons.items()]
    return TwigVLMError("; ".join(f"method {names}: {reason}" for names, reason in named))


def generate_options(model: TwigVLM, variant: Variant, seed: int = 0) -> dict[str, Any]:
    """Arguments of `TwigVLM.generate` that prune as a variant does.

    Args:
        model: the model that answers.
        variant: a variant from `make_variants`.
        seed: seed of random choices.
    """
    if variant.retain is None:
        return {}
    method = parse_method(variant.method)
    return {"retain": variant.retain, **method.options(model, variant.final_wipe, variant.final_share, seed)}


def check_variants(model: TwigVLM, variants: Sequence[Variant], visual: int) -> None:
    """Refuse variants that are impossible for a prompt with `visual` visual tokens.

    Args:
        model: the model that answers.
        variants: from `make_variants`.
        visual: M.

    Raises:
        TwigVLMError: a variant is impossible; the message names every such method and its possible budgets.
    """
    refusals = []
    for variant in variants:
        if variant.retain is None:
            continue
        try:
            pruner = _pruner(model, variant, 0)
            schedule(pruner, variant.retain, visual, model.base.num_layers)
            refocus = parse_method(variant.method).refocus
            if refocus is not None:
                check_refocus(refocus, pruner, model.base, model.twig)
        except TwigVLMError as error:
            refusals.append(f"method {variant.method!r}: {one_line(error)}")
    if refusals:
        raise TwigVLMError("; ".join(refusals))


def score_all(model: TwigVLM, inputs: dict[str, Any], methods: Sequence[str]) -> dict[str, Float[Tensor, "1 tokens"]]:
    """The scores by which every method ranks the visual tokens of one prompt, [1, tokens]; meaningless at text tokens.

    Args:
        model: the base with its twig.
        inputs: the processor's outputs for one prompt.
        methods: values of `Variant.method`, for methods that rank under the twig's cuts.

    Raises:
        TwigVLMError: a method is unknown, or names a layer that the base does not have.
    """
    scorers = {method: parse_method(method).scorer(model, seed=0) for method in methods}
    prefix, layers = PrefixCache(), model.base.num_layers
    for scorer in scorers.values():
        options: dict[str, Any] = {"keep": 1, "final_wipe": layers, "scorer": scorer, "max_new_tokens": 1}
        model.generate(**inputs, **options, do_sample=False, memory=prefix)
    return {method: prefix.scores[scorer] for method, scorer in scorers.items()}


def _pruner(model: TwigVLM, variant: Variant, seed: int) -> Pruner:
    """The pruner that `generate` makes of the same options, for requests that share a prompt."""
    how = generate_options(model, variant, seed)
    pruner, scorer = how.pop("pruner", None), how.pop("scorer", None)
    found = build_pruner(PruningConfig(**how), model.twig, model.base.num_layers, scorer, pruner)
    assert found is not None, "it has a budget"
    return found
