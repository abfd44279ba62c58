"""Ways to generate that are timed side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from twigvlm.config import WITHOUT_TWIG, SpeculationConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.assisted import prompt_lookup

HF_GENERATE = "HF generate, "
"""Begins the names of the base's own `generate`; its attention implementation follows."""


@dataclass(frozen=True)
class System:
    """One way to generate."""

    name: str
    attention: str | None = None
    """The base's own `generate` with this attention implementation; None: TwigVLM's, with `options`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the `generate` that is called."""
    same_as: str | None = None
    """System whose output this one must repeat."""
    assisted: bool = False
    """Whether a small model drafts for the base's own `generate`."""

    @property
    def is_baseline(self) -> bool:
        """Whether this is the base's own `generate` without speculation."""
        return self.attention is not None and not self.speculates

    @property
    def needs_twig(self) -> bool:
        """Whether a trained twig prunes or drafts."""
        prunes = "retain" in self.options and "pruner" not in self.options
        return prunes or self.options.get("speculate", "none") not in WITHOUT_TWIG

    @property
    def speculates(self) -> bool:
        """Whether the base's own `generate` speculates, which transformers calls assisted generation."""
        return self.attention is not None and (self.assisted or "prompt_lookup_num_tokens" in self.options)


def base_systems(attentions: Sequence[str]) -> list[System]:
    """The base's own `generate` with each of its attention implementations."""
    return [System(f"{HF_GENERATE}{attention}", attention) for attention in attentions]


def standard_systems(
    retain: float,
    chain: dict[str, Any],
    tree: dict[str, Any],
    attentions: Sequence[str],
    names: Sequence[str] = (),
    refocus: float | None = None,
    assistant: bool = False,
    lookup_ngram: int = SpeculationConfig.lookup_ngram,
) -> list[System]:
    """The base's `generate` per attention implementation, its ways to speculate, and the twig's parts alone and together.

    Args:
        retain: R̄.
        chain: options of chain speculation (`draft_length`, `draft_threshold`).
        tree: options of tree speculation (`tree_depth`, `tree_width`, `tree_expand`, `tree_nodes`).
        attentions: implementations that the base's `generate` is measured with.
        names: of those among the others that are wanted, together with what their output is compared to; none: all.
        refocus: τ of further systems that choose their visual tokens again; None: there are none.
        assistant: whether there is a small model that drafts for the base's own `generate`.
        lookup_ngram: n of prompt lookup, the base's own and ours, which draft as many tokens as a chain.

    Raises:
        TwigVLMError: there is no system of a name.
    """
    chain = {"speculate": "chain", **chain}
    tree = {"speculate": "tree", **tree}
    baselines = base_systems(attentions)
    lookup = {"speculate": "lookup", "draft_length": chain["draft_length"], "lookup_ngram": lookup_ngram}
    hf_lookup = prompt_lookup(chain["draft_length"], lookup_ngram)
    others = [
        System("HF prompt lookup", attentions[0], hf_lookup, baselines[0].name),
        *([System("HF assistant", attentions[0], {}, baselines[0].name, assisted=True)] if assistant else []),
        System("own loop"),
        System("pruning", options={"retain": retain}),
        System("chain", options=chain, same_as="own loop"),
        System("tree", options=tree, same_as="own loop"),
        System("auto", options={"speculate": "auto"}, same_as="own loop"),
        System("lookup", options=lookup, same_as="own loop"),
        System("exit", options={**chain, "speculate": "exit"}, same_as="own loop"),
        System("pruning + chain", options={"retain": retain, **chain}, same_as="pruning"),
        System("pruning + tree", options={"retain": retain, **tree}, same_as="pruning"),
        System("pruning + auto", options={"retain": retain, "speculate": "auto"}, same_as="pruning"),
        System("pruning + lookup", options={"retain": retain, **lookup}, same_as="pruning"),
        System("diverse", options={"retain": retain, "diverse": True}),
        System("diverse + auto", options={"retain": retain, "diverse": True, "speculate": "auto"}, same_as="diverse"),
    ]
    if refocus is not None:
        again = {"retain": retain, "refocus": refocus}
        others += [
            System("refocus", options=again),
            System("refocus + chain", options={**again, **chain}, same_as="refocus"),
            System("refocus + auto", options={**again, "speculate": "auto"}, same_as="refocus"),
            System("diverse + refocus", options={**again, "diverse": True}),
            System(
                "diverse + refocus + auto",
                options={**again, "diverse": True, "speculate": "auto"},
                same_as="diverse + refocus",
            ),
        ]
    known = {system.name: system for system in others}
    for name in names:
        if name not in known:
            raise TwigVLMError(f"system {name!r}: must be one of {', '.join(known)}")
    wanted = {*names, *(known[name].same_as for name in names)} if names else known.keys()
    return [*baselines, *(system for system in others if system.name in wanted)]


def draft_systems(retain: float, lengths: Sequence[int], thresholds: Sequence[float]) -> list[System]:
    """Pruning without drafts, and with chains of every length δ and threshold θ."""
    pruning = {"retain": retain}
    return [
        System("pruning", options=pruning),
        *(
            System(
                f"δ={length} θ={threshold:g}",
                options={**pruning, "speculate": "chain", "draft_length": length, "draft_threshold": threshold},
                same_as="pruning",
            )
            for length in lengths
            for threshold in thresholds
        ),
    ]
