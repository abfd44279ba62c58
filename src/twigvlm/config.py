"""The options of the library, as frozen dataclasses; the command line's options and help are generated from them.

A sentence "None: …" in a description says what happens if the option is left out; `--help` shows it as the default.
"""

from dataclasses import dataclass, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args

from twigvlm.errors import TwigVLMError

MAX_NODES = 64
"""Largest number of nodes in a pass that `auto` chooses, including the root."""

Speculate = Literal["none", "chain", "tree", "auto", "lookup", "exit"]
"""Ways to draft; see `SpeculationConfig`."""

WITHOUT_TWIG = ("none", "lookup", "exit")
"""Those of them that need no twig."""

_APPLY: dict[str, tuple[str, ...]] = {
    "none": (),
    "chain": ("draft_length", "draft_threshold"),
    "tree": ("tree_depth", "tree_width", "tree_expand", "tree_nodes"),
    "auto": ("tree_width",),
    "lookup": ("draft_length", "lookup_ngram"),
    "exit": ("draft_length", "draft_threshold"),
}
"""Which options apply to which way of drafting."""


@dataclass(frozen=True)
class TwigConfig:
    """Shape of a twig (the paper's §3.1). K and T default to the published sizes. The default has no P-Head, unlike `twigvlm
    train stage1`, and no FinalWipe; the published twig of TwigVLM++ has both."""

    trunk_layers: int = 2
    """K: base layers shared by the base and the twig; the twig grows on the output of layer K."""
    twig_layers: int = 3
    """T: decoder layers of the twig."""
    init: Literal["next", "last", "random"] = "next"
    """Twig layers start as copies of base layers K+1..K+T, of the last T base layers, or at random."""
    head: Literal["own", "shared"] = "own"
    """Prediction head: a trainable copy of the base's LM head (own), or the base's frozen head itself (shared)."""
    draft_vocabulary: int | None = None
    """V_d: number of different tokens that the twig can draft. It never changes the output. None: the base's whole vocabulary."""
    final_wipe: int | None = None
    """K_f the twig was tuned with: only `final_share` of the kept visual tokens go on after it. None: K_f = L, no FinalWipe."""
    final_share: float = 0.0
    """φ the twig was tuned with: the share of the kept visual tokens that layers after K_f still get. 0: none, as published."""
    pruning_head: bool = False
    """Whether the twig has a P-Head, which scores visual tokens in place of its last layer's attention (Eq. 7)."""

    def __post_init__(self) -> None:
        at_least(0, trunk_layers=self.trunk_layers)
        at_least(1, twig_layers=self.twig_layers)
        _one_of(("next", "last", "random"), init=self.init)
        _one_of(("own", "shared"), head=self.head)
        if self.draft_vocabulary is not None:
            at_least(1, draft_vocabulary=self.draft_vocabulary)
        if self.final_wipe is not None:
            at_least(self.trunk_layers + 1, final_wipe=self.final_wipe)
        _boolean(pruning_head=self.pruning_head)
        check_final_share(self.final_share)
        if self.final_share and self.final_wipe is None:
            raise TwigVLMError(f"final_share={self.final_share:g}: is what stays after layer K_f; give final_wipe too")

    def cut_layers(
        self, layers: int, final_wipe: int | None = None, final_share: float | None = None
    ) -> tuple[int, int, float]:
        """K, K_f and φ on a base of L layers (`layers`). None: as the twig was tuned."""
        wipe = self.final_wipe if final_wipe is None else final_wipe
        share = self.final_share if final_share is None else final_share
        return self.trunk_layers, layers if wipe is None else wipe, share


@dataclass(frozen=True)
class PruningConfig:
    """How many visual tokens to keep. Without `retain` or `keep`, all of them stay."""

    retain: float | None = None
    """R̄: average number of visual tokens over all base layers (Eq. 6), the budget that papers quote. None: no pruning."""
    keep: int | None = None
    """R: visual tokens kept in layers K+1..K_f, instead of an average."""
    final_wipe: int | None = None
    """K_f: visual tokens leave after this layer; the base's number of layers turns this off. None: the twig's own."""
    final_share: float | None = None
    """φ: the share of the kept visual tokens, those with the highest scores, that stay after layer K_f. None: the twig's own."""
    retain_per_image: bool = False
    """Split the budget evenly among the images, or frames with text between them, instead of by scores alone."""
    refocus: float | None = None
    """τ: while the answer grows, choose the kept visual tokens again whenever their scores add up to less than this share of the
    highest possible sum. None: the tokens that were chosen for the question stay."""
    pruner: str | None = None
    """Another pruning method, by name (`twigvlm methods`), with the budget `retain`. None: the twig's own."""
    scout: bool = False
    """Rank the visual tokens with trunk and twig first, then run every decoder layer on the kept tokens only."""
    diverse: bool = False
    """Keep visual tokens with high scores that also differ from each other, instead of those with the highest scores."""

    def __post_init__(self) -> None:
        if self.retain is not None:
            check_number("retain", self.retain)
        for name, value in self._given("keep", "final_wipe"):
            _whole(name, value)
        _boolean(retain_per_image=self.retain_per_image, scout=self.scout, diverse=self.diverse)
        if self.retain is not None and self.keep is not None:
            raise TwigVLMError(f"retain={self.retain:g} and keep={self.keep}: give only one of them")
        if self.pruner is not None:
            self._check_pruner()
        if self.final_share is not None:
            check_final_share(self.final_share)
        if self.refocus is not None:
            check_coverage(self.refocus)
        given = self._given("final_wipe", "final_share", "retain_per_image", "refocus", "scout", "diverse")
        if given and not self.active:
            name, value = given[0]
            shown = value if value is True else f"{value:g}"
            raise TwigVLMError(f"{name}={shown}: needs a budget; give retain or keep too")
        if self.scout:
            self._check_scout()
        if self.retain_per_image and self.diverse:
            raise TwigVLMError("diverse and retain_per_image: give only one of them")
        if self.retain_per_image and self.refocus is not None:
            raise TwigVLMError(
                "refocus and retain_per_image: give only one of them, since tokens are chosen again by scores alone"
            )

    def _given(self, *names: str) -> list[tuple[str, Any]]:
        """Those of the options that were given, with their values."""
        values = ((name, getattr(self, name)) for name in names)
        return [(name, value) for name, value in values if value is not None and value is not False]

    def _check_pruner(self) -> None:
        if self.pruner == "twig":
            if not self.active:
                raise TwigVLMError("pruner='twig': needs a budget; give retain or keep")
            return
        if self.retain is None:
            raise TwigVLMError(f"pruner={self.pruner!r}: needs a budget; give retain")
        self.check_beside_pruner()

    def check_beside_pruner(self, scorer: object = None) -> None:
        """Raise TwigVLMError where another method is to prune, and an option of the twig's own pruning is given.

        Args:
            scorer: that the twig's pruning would rank by; None: none was given.
        """
        given = self._given("keep", "final_wipe", "final_share", "refocus", "scout", "diverse", "retain_per_image")
        if given or scorer is not None:
            name = given[0][0] if given else "scorer"
            raise TwigVLMError(f"{name}: belongs to the twig's own pruning; leave it out beside pruner")

    def _check_scout(self) -> None:
        if given := self._given("final_wipe", "final_share", "refocus"):
            name, value = given[0]
            reason = (
                "no layer holds the dropped tokens" if name == "refocus" else "scouting keeps R tokens in all layers"
            )
            raise TwigVLMError(f"scout and {name}={value:g}: give only one of them, since {reason}")

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.retain is not None or self.keep is not None


@dataclass(frozen=True)
class SpeculationConfig:
    """How tokens are drafted. In float32 the output does not depend on it."""

    speculate: Speculate = "none"
    """How to draft. none: one token per step. chain: draft a few tokens and verify them in one pass (Algorithm 1).
    tree: draft a tree of alternatives (Algorithm 2). auto: draft trees of the size that is fastest on this machine, which is
    measured once for a few seconds, and draft nothing where it does not pay off. lookup: draft what followed the newest
    tokens where they occurred before, in the prompt or the answer. exit: chains by the base's own head on the states after
    layer K. lookup and exit need no twig."""
    draft_length: int = 5
    """δ: longest chain, in tokens."""
    draft_threshold: float = 0.6
    """θ: a chain ends after a token whose probability is below this."""
    tree_depth: int = 4
    """D: longest path of a tree, in tokens."""
    tree_width: int = 10
    """E: number of children of each expanded node."""
    tree_expand: int = 10
    """K_sel: how many nodes of each level are expanded, the most probable ones."""
    tree_nodes: int = 60
    """N_max: largest number of drafted tokens of a tree that are verified."""
    lookup_ngram: int = 3
    """Longest run of newest tokens to look up; shorter ones are tried if it did not occur before."""

    def __post_init__(self) -> None:
        _one_of(get_args(Speculate), speculate=self.speculate)
        at_least(1, draft_length=self.draft_length)
        at_least(1, tree_depth=self.tree_depth, tree_width=self.tree_width)
        at_least(1, tree_expand=self.tree_expand, tree_nodes=self.tree_nodes)
        at_least(1, lookup_ngram=self.lookup_ngram)
        check_number("draft_threshold", self.draft_threshold)
        if not 0.0 <= self.draft_threshold <= 1.0:
            raise TwigVLMError(f"draft_threshold={self.draft_threshold:g}: must be 0 to 1")
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in ("speculate", *_APPLY[self.speculate]) and value != option.default:
                raise TwigVLMError(
                    f"{option.name}={value:g}: does not apply to speculate={self.speculate!r}; leave it out, or speculate by "
                    + " or ".join(repr(way) for way, names in _APPLY.items() if option.name in names)
                )

    @property
    def active(self) -> bool:
        """Whether anything can be drafted."""
        return self.speculate != "none"

    @property
    def step_tokens(self) -> int:
        """Most tokens that a layer receives in one step (rarely more with auto), before rejected ones are dropped."""
        if self.speculate == "auto":
            return 2 * MAX_NODES
        if self.speculate == "tree":
            return 1 + self.tree_expand * (self.tree_depth - 1) + self.tree_nodes
        return 1 + (self.draft_length if self.active else 0)


@dataclass(frozen=True)
class SamplingConfig:
    """How each token of an answer is chosen. In float32 speculation does not change the draws; unpruned, they are the base's."""

    temperature: float | None = None
    """Sample at this temperature. None: always take the most probable token."""
    top_p: float | None = None
    """Sample only from the most probable tokens that together have this probability. None: from all tokens."""
    seed: int | None = None
    """Random seed. None: 0."""

    def __post_init__(self) -> None:
        if self.temperature is None:
            for name, value in (("top_p", self.top_p), ("seed", self.seed)):
                if value is not None:
                    raise TwigVLMError(f"{name}={value:g}: needs a temperature; add --temperature 1, or leave it out")
            return
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise TwigVLMError(f"seed={self.seed}: must be 0 or more, and less than 2^63")
        if not (self.temperature > 0 and isfinite(self.temperature)):
            raise TwigVLMError(f"temperature={self.temperature:g}: must be more than 0; leave it out to be greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise TwigVLMError(f"top_p={self.top_p:g}: must be more than 0, and at most 1")

    def generate_options(self) -> dict[str, Any]:
        """Arguments of `generate`; the seed is the caller's to set."""
        if self.temperature is None:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p or 1.0}


def check_coverage(refocus: float) -> None:
    """Raise TwigVLMError unless τ is more than 0 and at most 1."""
    check_number("refocus", refocus)
    if not 0 < refocus <= 1:
        raise TwigVLMError(f"refocus={refocus:g}: must be more than 0, and at most 1")


def check_final_share(final_share: float) -> None:
    """Raise TwigVLMError unless φ is 0 to 1."""
    check_number("final_share", final_share)
    if not 0 <= final_share <= 1:
        raise TwigVLMError(f"final_share={final_share:g}: must be 0 to 1")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TwigVLMError(f"{name}={value!r}: must be a whole number")


def check_number(name: str, value: object) -> None:
    """Raise TwigVLMError unless an option is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TwigVLMError(f"{name}={value!r}: must be a number")


def _boolean(**option: object) -> None:
    for name, value in option.items():
        if not isinstance(value, bool):
            raise TwigVLMError(f"{name}={value!r}: must be True or False")


def at_least(low: int, **option: int) -> None:
    """Raise TwigVLMError unless each option is a whole number of at least `low`."""
    for name, value in option.items():
        _whole(name, value)
        if value < low:
            raise TwigVLMError(f"{name}={value}: must be {low} or more")


def _one_of(allowed: tuple[str, ...], **option: str) -> None:
    for name, value in option.items():
        if value not in allowed:
            raise TwigVLMError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
