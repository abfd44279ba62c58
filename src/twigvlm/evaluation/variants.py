"""One question answered under many prunings, with all that they share computed once.

Shared: vision, prompt, trunk, twig, and one pass through the whole base that gives the unpruned answer and every watched
layer's attention. Variants that keep equally many tokens run layers K+1..L and decode together, as a batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.generation import LogitsProcessorList

from twigvlm.base.token_inputs import expand_rows, slice_tokens
from twigvlm.engine.prefill import Scorer, TrunkOutput, run_kept
from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import KVCache
from twigvlm.model import TwigVLM
from twigvlm.pruning.budget import solve_keep
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.methods.random import RandomScores
from twigvlm.pruning.methods.twig_attention import TwigAttention, layer_scores
from twigvlm.pruning.select import top_visual
from twigvlm.twig.block import Twig

METHODS = "none, twig, attention, twig-text, random, fastv, deep:LAYER"
_SCORED = ("twig", "attention", "twig-text", "random")


@dataclass(frozen=True)
class Variant:
    """One way to prune, under one budget."""

    method: str
    """none; twig: the twig's own ranking (its P-Head's where it has one); attention, twig-text: last twig layer's attention,
    of the last or of all text queries; random; fastv: attention of base layer K; deep:N: attention of base layer N
    (counted from 1), an oracle that needs a full pass."""
    retain: float | None = None
    """R̄, by the same formula for every method; None for none."""
    final_wipe: int | None = None
    """K_f; None for none."""

    @property
    def name(self) -> str:
        """For example `twig@64`, K_f aside: `twig@64/24`."""
        if self.retain is None:
            return self.method
        return f"{self.method}@{self.retain:g}/{self.final_wipe}"


NONE = Variant("none")


def make_variants(
    model: TwigVLM, methods: Sequence[str], budgets: Sequence[float], final_wipes: Sequence[int] = ()
) -> list[Variant]:
    """Every method under every budget and K_f (none given: the twig's own), and no pruning.

    Raises:
        TwigVLMError: an unknown method, or a layer that the base does not have.
    """
    for method in methods:
        if method not in ("none", *_SCORED):
            watched_layer(method, model)
    layers = model.base.num_layers
    wipes = list(final_wipes) or [layers if model.config.final_wipe is None else model.config.final_wipe]
    pruned = [Variant(m, b, k) for m in dict.fromkeys(methods) if m != "none" for b in budgets for k in wipes]
    if not pruned:
        raise TwigVLMError("nothing to compare: give at least one method that prunes, and one budget")
    return [NONE, *pruned]


def watched_layer(method: str, model: TwigVLM) -> int:
    """The base layer (from 1) whose attention a method ranks by."""
    layers = model.base.num_layers
    name, _, number = method.partition(":")
    if method == "fastv":
        if not model.config.trunk_layers:
            raise TwigVLMError("method 'fastv': ranks by the last trunk layer, and this twig has none (K = 0)")
        return model.config.trunk_layers
    if name != "deep" or not number.isdigit():
        raise TwigVLMError(f"method {method!r}: must be one of {METHODS}")
    if not 1 <= int(number) <= layers:
        raise TwigVLMError(f"method {method!r}: the layer must be 1 to {layers}, the layers of this base")
    return int(number)


@dataclass(frozen=True)
class Outcome:
    """What a variant answered."""

    ids: list[int]
    """New ids; the last one is the end token unless the answer was cut."""
    kept: int
    """R; M without pruning."""


@torch.inference_mode()
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
    shared = _Shared(model, inputs, max_new_tokens)
    groups: dict[tuple[int, int], list[Variant]] = {}
    for variant in variants:
        if variant.retain is not None:
            groups.setdefault(shared.budget(variant), []).append(variant)
    methods = {variant.method for variant in variants} - {NONE.method}
    watched = _watched(methods, model)
    shared.open(set(watched.values()))
    outcomes = {}
    plain = shared.unpruned()
    if any(variant.retain is None for variant in variants):
        outcomes[NONE.name] = plain
    scores = shared.scores(methods, watched, seed)
    for (keep, final_wipe), members in groups.items():
        answers = shared.pruned(torch.cat([scores[v.method] for v in members]), keep, final_wipe)
        outcomes.update({v.name: answer for v, answer in zip(members, answers, strict=True)})
    return outcomes


@torch.inference_mode()
def score_all(
    model: TwigVLM, inputs: dict[str, Any], methods: Sequence[str], seed: int = 0
) -> dict[str, Float[Tensor, "1 tokens"]]:
    """What every method ranks the visual tokens of one prompt by, from one pass; of no meaning at text tokens.

    Args:
        inputs: the processor's outputs for one prompt.
        methods: of `Variant.method`, without none.
        seed: of the random choice.

    Raises:
        TwigVLMError: an unknown method, or a layer that the base does not have.
    """
    watched = _watched(methods, model)
    shared = _Shared(model, inputs, max_new_tokens=1)
    shared.open(set(watched.values()))
    return shared.scores(methods, watched, seed)


def _watched(methods: Iterable[str], model: TwigVLM) -> dict[str, int]:
    return {method: watched_layer(method, model) for method in methods if method not in _SCORED}


def _scorer(method: str, twig: Twig, seed: int) -> Scorer:
    if method == "twig":
        return default_scorer(twig)
    if method == "random":
        return RandomScores(seed)
    return TwigAttention("text" if method == "twig-text" else "last")


def _processors(model: Any, inputs: dict[str, Any], max_new_tokens: int) -> LogitsProcessorList:
    """What the base's own greedy `generate` applies to its logits."""
    found: list[LogitsProcessorList] = []

    def run(_: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **__: Any) -> Tensor:
        found.append(logits_processor)
        return input_ids

    model.generate(**inputs, custom_generate=run, max_new_tokens=max_new_tokens, do_sample=False)
    return found[0]


class _Shared:
    """One prompt after the trunk, and what variants compute from there."""

    def __init__(self, model: TwigVLM, inputs: dict[str, Any], max_new_tokens: int) -> None:
        self.base, self.twig = model.base, model.twig
        self.trunk_layers, self.layers = model.config.trunk_layers, model.base.num_layers
        self.limit = max_new_tokens
        self.ids, self.processors = inputs["input_ids"], _processors(model.model, inputs, max_new_tokens)
        ends = model.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.base.check_images(inputs["input_ids"], inputs)
        self.prompt = self.base.prompt(**inputs)
        self.visual = int(self.prompt.visual_mask.sum())
        self.rope = self.base.token_inputs(self.prompt)
        self.new_rope = self.base.inputs_after(self.prompt, max_new_tokens)
        self.masks = self.base.masks(self.prompt, rows=1, new_tokens=max_new_tokens)
        self.cache = KVCache(self.twig.last_slot + 1, reserve=max_new_tokens)
        self.rows: dict[int, Tensor] = {}

    def budget(self, variant: Variant) -> tuple[int, int]:
        """(R, K_f)."""
        assert variant.retain is not None, "no pruning has no budget"
        final_wipe = self.layers if variant.final_wipe is None else variant.final_wipe
        return solve_keep(variant.retain, self.visual, self.layers, self.trunk_layers, final_wipe), final_wipe

    def open(self, watched: set[int]) -> None:
        """Run every layer on the whole prompt; scores by the attention of the watched ones go to `rows`."""
        hidden = self.prompt.hidden
        for layer in range(self.layers):
            if layer == self.trunk_layers:
                self.after_trunk = hidden
            before = hidden
            hidden = self.base.run_layers(hidden, layer, layer + 1, self.rope, self.masks, self.cache)
            if layer + 1 in watched:
                keys, _ = self.cache.held(layer)
                self.rows[layer + 1] = layer_scores(
                    self.base.layers[layer], before, self.rope, keys, self.prompt, "last"
                )
        self.last = hidden[:, -1]

    def unpruned(self) -> Outcome:
        """The base's own answer."""
        ids = self._decode(self.cache, self.last)[0]
        self.cache.truncate(0, self.layers, self.prompt.lengths)
        return Outcome(ids, self.visual)

    def scores(
        self, methods: Iterable[str], watched: dict[str, int], seed: int
    ) -> dict[str, Float[Tensor, "1 tokens"]]:
        """Scores by every method; those of watched layers are there already."""
        scores = {}
        for method in methods:
            if method in watched:
                scores[method] = self.rows[watched[method]]
            else:
                scores[method] = self.score(_scorer(method, self.twig, seed))
        return scores

    def score(self, scorer: Scorer) -> Float[Tensor, "1 tokens"]:
        """Scores by anything that looks at the prompt after the trunk."""
        trunk = TrunkOutput(self.base, self.twig, self.prompt, self.after_trunk, self.rope, self.masks, self.cache)
        scores = scorer(trunk)
        self.cache.truncate(self.twig.first_slot, self.twig.last_slot + 1, (0,))  # the next scorer fills it anew
        return scores

    def pruned(self, scores: Float[Tensor, "variants tokens"], keep: int, final_wipe: int) -> list[Outcome]:
        """The answers of variants that keep equally many tokens, each by its own scores."""
        count = len(scores)
        visual = self.prompt.visual_mask.expand(count, -1)
        stays = top_visual(scores, visual, [keep] * count) | ~visual
        cache = KVCache(self.layers, reserve=self.limit)
        for layer in range(self.trunk_layers):
            cache.borrow(self.cache, layer, count)
        hidden, _ = run_kept(
            self.base,
            self.after_trunk.expand(count, -1, -1),
            stays,
            visual,
            expand_rows(self.rope, count),
            self.trunk_layers,
            final_wipe,
            self.masks,
            cache,
        )
        return [Outcome(ids, keep) for ids in self._decode(cache, hidden[:, -1])]

    def _decode(self, cache: KVCache, last: Float[Tensor, "rows width"]) -> list[list[int]]:
        """Greedy answers from the states of the last prompt token after layer L; a row that has ended is run on idly."""
        answers: list[list[int]] = [[] for _ in last]
        ids = self.ids.expand(len(last), -1)
        for index in range(self.limit):
            choices = self.processors(ids, self.base.logits(last).float()).argmax(dim=-1)
            ids = torch.cat((ids, choices[:, None]), dim=1)
            for answer, token in zip(answers, choices.tolist(), strict=True):
                if not answer or answer[-1] not in self.ends:
                    answer.append(token)
            if index + 1 == self.limit or all(answer[-1] in self.ends for answer in answers):
                break
            rope = expand_rows(slice_tokens(self.new_rope, index, index + 1), len(last))
            hidden = self.base.embed(choices[:, None])
            last = self.base.run_layers(hidden, 0, self.layers, rope, self.masks, cache)[:, -1]
        return answers
