"""Prefill: layers 1..K on everything, twig, scores, layers K+1..K_f on the kept tokens, FinalWipe, the rest (§3.3)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.base.masks import Masks
from twigvlm.base.packing import Lengths, last_token, left_pack, valid_mask
from twigvlm.base.prompt import Prompt
from twigvlm.base.token_inputs import TokenInputs, select_tokens, slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.engine.prefix_cache import PrefixCache
from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.select import evenly, gather_tokens, top_visual
from twigvlm.twig.block import Twig


@dataclass(frozen=True)
class TrunkOutput:
    """A prompt after layer K: what a scorer may look at."""

    base: BaseVLM
    twig: Twig
    prompt: Prompt
    hidden: Float[Tensor, "batch tokens width"]
    """States after layer K."""
    rope: TokenInputs
    masks: Masks
    cache: KVCache
    memory: PrefixCache = field(default_factory=PrefixCache)
    """Of the conversation; what it knows of the prompt is in the twig's cache already."""

    def grow(self) -> Tensor:
        """Run the twig on what its cache does not hold of the prompt; the input of its last layer, [batch, tokens, width]."""
        known, tokens = self.cache.get_seq_length(self.twig.first_slot), self.hidden.shape[1]
        before = self.memory.last_input
        if before is not None and known == tokens:
            return before
        hidden = self.twig.fill(self.hidden[:, known:], slice_tokens(self.rope, known, tokens), self.masks, self.cache)
        self.cache.truncate(self.twig.first_slot, self.twig.last_slot + 1, self.prompt.lengths)
        if before is not None:
            hidden = torch.cat((before[:, :known], hidden), dim=1)
        self.memory.last_input = hidden
        return hidden


Scorer = Callable[[TrunkOutput], Tensor]
"""Ranks visual tokens: scores [batch, tokens], read at visual positions only. The twig's own, or a baseline's."""


@dataclass(frozen=True)
class Plan:
    """What a prefill keeps."""

    keep: Lengths | None
    """R of each prompt; None: prune nothing."""
    final_wipe: int
    """K_f."""
    scorer: Scorer
    per_image: bool = False
    """Whether R is split evenly among a prompt's images."""


@dataclass(frozen=True)
class Prefilled:
    """A prompt in the caches."""

    logits: Float[Tensor, "batch vocabulary"]
    """The base's, at the last prompt token."""
    kept: Bool[Tensor, "batch tokens"] | None
    """True at the kept visual tokens; None without pruning."""
    unseen: TrunkOutput | None
    """The prompt, if the twig's cache does not hold it yet: no ranking needed the twig, and maybe no draft will."""


def prefill(
    base: BaseVLM,
    twig: Twig,
    prompt: Prompt,
    plan: Plan,
    masks: Masks,
    cache: KVCache,
    memory: PrefixCache | None = None,
) -> Prefilled:
    """Fill the caches: trunk with everything, middle layers with text + R, late layers with text only.

    The twig's own part, which holds everything too, is filled by a ranking that uses the twig, or else by the first draft.

    Args:
        plan: what to keep.
        masks: of the request.
        cache: empty, or the conversation's.
        memory: of a conversation, whose cache this is: trunk and twig run on what it does not know, and it knows it then.

    Returns:
        The base's logits, and what was kept.

    Raises:
        TwigVLMError: the last token, from which the answer begins, is a visual one that pruning may drop.
    """
    trunk_layers = twig.config.trunk_layers
    rope = base.token_inputs(prompt)
    known = 0
    if memory is not None:
        known = memory.known(prompt.input_ids)
        cache.truncate(0, trunk_layers, (known,))
        cache.truncate(trunk_layers, base.num_layers, (0,))
        cache.truncate(twig.first_slot, twig.last_slot + 1, (known,))
    rest = slice_tokens(rope, known, prompt.hidden.shape[1])
    hidden = base.run_layers(prompt.hidden[:, known:], 0, trunk_layers, rest, masks, cache)
    cache.truncate(0, trunk_layers, prompt.lengths)
    if memory is not None:
        if memory.hidden is not None:
            hidden = torch.cat((memory.hidden[:, :known], hidden), dim=1)
        memory.prompt, memory.cache, memory.hidden = prompt, cache, hidden
    trunk = TrunkOutput(base, twig, prompt, hidden, rope, masks, cache, memory or PrefixCache())
    kept: Tensor | None = None
    if plan.keep is None:
        hidden = base.run_layers(hidden, trunk_layers, base.num_layers, rope, masks, cache)
        cache.truncate(trunk_layers, base.num_layers, prompt.lengths)
        newest = last_token(hidden, prompt.lengths)
    else:
        visual = prompt.visual_mask
        if bool(last_token(visual[..., None], prompt.lengths).any()):
            raise TwigVLMError("the prompt ends with a visual token: put text behind it, or leave pruning out")
        scores = plan.scorer(trunk)
        kept = top_visual(evenly(scores, visual) if plan.per_image else scores, visual, plan.keep)
        stays = kept | (valid_mask(prompt.lengths, hidden.shape[1], hidden.device) & ~visual)
        hidden, lengths = run_kept(base, hidden, stays, visual, rope, trunk_layers, plan.final_wipe, masks, cache)
        newest = last_token(hidden, lengths)
    grown = cache.get_seq_length(twig.first_slot) == prompt.hidden.shape[1]
    return Prefilled(base.logits(newest), kept, None if grown else trunk)


def run_kept(
    base: BaseVLM,
    hidden: Float[Tensor, "batch tokens width"],
    stays: Bool[Tensor, "batch tokens"],
    visual: Bool[Tensor, "batch tokens"],
    rope: TokenInputs,
    trunk_layers: int,
    final_wipe: int,
    masks: Masks,
    cache: KVCache | None,
) -> tuple[Float[Tensor, "batch remaining width"], Lengths]:
    """Layers K+1..K_f on the kept tokens, FinalWipe, layers K_f+1..L on text.

    Args:
        hidden: states of all tokens after layer K.
        stays: which tokens are kept, text included.
        visual: which tokens are visual.
        rope: of all tokens.
        trunk_layers: K.
        final_wipe: K_f.
        masks: the request's.
        cache: layers K+1..L of it are filled; None: nothing is kept.

    Returns:
        States after layer L of the tokens that are left, and how many each row has; its last one is the last prompt token's.
    """
    indices, lengths = left_pack(stays)
    tokens = hidden.shape[1]
    hidden, rope = gather_tokens(hidden, indices), select_tokens(rope, indices)
    if rope.places is not None:  # what fills a row up gets a place where no token of an image sees it ahead of itself
        filling = ~valid_mask(lengths, indices.shape[1], indices.device)
        rope = rope._replace(places=rope.places.masked_fill(filling, tokens))
    hidden = base.run_layers(hidden, trunk_layers, final_wipe, rope, masks, cache)
    if cache is not None:
        cache.truncate(trunk_layers, final_wipe, lengths)
    if final_wipe < base.num_layers:
        text, lengths = left_pack(torch.gather(stays & ~visual, 1, indices))
        hidden, rope = gather_tokens(hidden, text), select_tokens(rope, text)
        hidden = base.run_layers(hidden, final_wipe, base.num_layers, rope, masks, cache)
        if cache is not None:
            cache.truncate(final_wipe, base.num_layers, lengths)
    return hidden, lengths
