"""Systems, that is ways to generate that are timed side by side, by names that say what prunes and what drafts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twigvlm.config import WITHOUT_TWIG
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.assisted import prompt_lookup
from twigvlm.evaluation.methods import parse_method
from twigvlm.model import TwigVLM

HF_GENERATE = "HF generate, "
"""Beginning of the names of the base's own `generate`, followed by its attention implementation."""
HF_LOOKUP, HF_ASSISTANT = "HF prompt lookup", "HF assistant"
"""The base's own `generate` with drafts by prompt lookup, and with drafts by a small model."""
OWN_LOOP = "own loop"
"""`TwigVLM.generate` without pruning or drafts."""


@dataclass(frozen=True)
class System:
    """One way to generate."""

    name: str
    """Name in reports and raw results."""
    attention: str | None = None
    """Attention implementation of the base's own `generate`; None: `TwigVLM.generate` answers."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the `generate` that is called, in addition to those of the method."""
    same_as: str | None = None
    """Name of the system whose output this one must repeat; None: there is none."""
    assisted: bool = False
    """Whether a small model drafts for the base's own `generate`."""
    method: str = "none"
    """Name of the pruning method, for `parse_method`."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is the base's own `generate` without speculation."""
        return self.attention is not None and not self.speculates

    @property
    def needs_twig(self) -> bool:
        """Whether a trained twig prunes or drafts."""
        return parse_method(self.method).needs_twig or self.options.get("speculate", "none") not in WITHOUT_TWIG

    @property
    def speculates(self) -> bool:
        """Whether the base's own `generate` speculates; transformers calls this assisted generation."""
        return self.attention is not None and (self.assisted or "prompt_lookup_num_tokens" in self.options)

    def arguments(self, model: TwigVLM) -> dict[str, Any]:
        """Arguments of the `generate` that is called, except for inputs and length. K_f and φ are the twig's."""
        return {**self.options, **parse_method(self.method).options(model, None, None, seed=0)}


def base_systems(attentions: Sequence[str]) -> list[System]:
    """The base's own `generate` with each attention implementation; repeated names count once."""
    return [System(f"{HF_GENERATE}{attention}", attention) for attention in dict.fromkeys(attentions)]


def memory_remedy(smaller: str, systems: Sequence[System]) -> str:
    """What the user can do if systems run out of memory, as text.

    Args:
        smaller: what the user can make smaller.
        systems: systems that are measured; eager attention needs memory for all attention weights at once.
    """
    eager = any(system.attention == "eager" for system in systems)
    return f"use smaller {smaller}{', or leave eager out of --baselines' if eager else ''}"


def drafting_ways(chain: dict[str, Any], tree: dict[str, Any], lookup_ngram: int) -> dict[str, dict[str, Any]]:
    """Arguments of `TwigVLM.generate` for every way to draft, by its name.

    Args:
        chain: options of chains (`draft_length`, `draft_threshold`); early exit takes them too.
        tree: options of trees (`tree_depth`, `tree_width`, `tree_expand`, `tree_nodes`).
        lookup_ngram: n of prompt lookup, which drafts as many tokens as a chain.
    """
    lookup = {"draft_length": chain["draft_length"], "lookup_ngram": lookup_ngram}
    options = {"chain": chain, "tree": tree, "auto": {}, "lookup": lookup, "exit": chain}
    return {way: {"speculate": way, **more} for way, more in options.items()}


def named_systems(
    names: Sequence[str],
    retain: float,
    ways: Mapping[str, dict[str, Any]],
    attentions: Sequence[str],
    assistant: bool = False,
) -> list[System]:
    """The base's `generate` with each attention implementation, and the named systems, each with the one it must repeat.

    Args:
        names: `own loop`, a way to draft, a pruning method as `parse_method` reads it, both as in `twig + chain`, or
            `HF prompt lookup` and `HF assistant`; none: all ways to draft, the twig's pruning with them, and `diverse`.
        retain: R̄.
        ways: from `drafting_ways`.
        attentions: attention implementations with which the base's `generate` is measured.
        assistant: whether there is a small model that drafts for the base's own `generate`.

    Raises:
        TwigVLMError: a name is not that of a system.
    """
    baselines = base_systems(attentions)
    first = baselines[0]
    lookup = prompt_lookup(ways["lookup"]["draft_length"], ways["lookup"]["lookup_ngram"])
    of_hf = {HF_LOOKUP: System(HF_LOOKUP, first.attention, lookup, first.name)}
    if assistant:
        of_hf[HF_ASSISTANT] = System(HF_ASSISTANT, first.attention, {}, first.name, assisted=True)
    pruned = [f"twig + {way}" for way in ways if way != "exit"]
    if assistant and names and HF_ASSISTANT not in names:
        raise TwigVLMError(
            f"assistant: takes part in {HF_ASSISTANT!r} alone; add it to systems, or leave assistant out"
        )
    chosen = {system.name: system for system in baselines}
    for name in names or (*of_hf, OWN_LOOP, *ways, "twig", *pruned, "diverse", "diverse + auto"):
        system = of_hf[name] if name in of_hf else _system(name, retain, ways)
        if system.same_as is not None and system.same_as not in chosen:
            chosen[system.same_as] = _system(system.same_as, retain, ways)
        chosen[name] = system
    return list(chosen.values())


def _system(name: str, retain: float, ways: Mapping[str, dict[str, Any]]) -> System:
    """Parse the name of a system that `TwigVLM.generate` runs."""
    if name == OWN_LOOP:
        return System(name)
    if name in ways:
        return System(name, options=ways[name], same_as=OWN_LOOP)
    method, plus, way = name.rpartition(" + ")
    drafts = bool(plus) and way in ways
    method = method if drafts else name
    choices = f"{OWN_LOOP}, {HF_LOOKUP}, {', '.join(ways)}, a pruning method, or both as in 'twig + chain'"
    try:
        prunes = parse_method(method).ranking != "none"
    except TwigVLMError as error:
        raise TwigVLMError(f"system {name!r}: {error}; choose {choices}; {HF_ASSISTANT} needs assistant") from None
    if not prunes:
        raise TwigVLMError(f"system {name!r}: prunes nothing; choose {choices}")
    options = {"retain": retain, **(ways[way] if drafts else {})}
    return System(name, options=options, same_as=method if drafts else None, method=method)


def draft_systems(method: str, retain: float, lengths: Sequence[int], thresholds: Sequence[float]) -> list[System]:
    """Pruning without drafts, and with chains of every length δ and threshold θ."""
    pruning = {"retain": retain}
    return [
        System(method, options=pruning, method=method),
        *(
            System(
                f"δ={length} θ={threshold:g}",
                options={**pruning, "speculate": "chain", "draft_length": length, "draft_threshold": threshold},
                same_as=method,
                method=method,
            )
            for length in dict.fromkeys(lengths)
            for threshold in dict.fromkeys(thresholds)
        ),
    ]
