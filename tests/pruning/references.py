"""What pruning is, without masks, caches or batches: a prompt by itself, whose tokens are dropped layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twigvlm.base.masks import causal_mask
from twigvlm.base.vlm import BaseVLM
from twigvlm.pruning.cut import Cut
from twigvlm.pruning.select import top_visual
from twigvlm.pruning.view import CutView


def loudest(hidden: Tensor, visual: Tensor, keep: Sequence[int]) -> Tensor:
    """The visual tokens with the largest states, which differ from layer to layer."""
    return top_visual(hidden.norm(dim=-1), visual, keep)


@dataclass(frozen=True)
class Loudest:
    """A pruner of the cuts that it is told."""

    schedule: tuple[Cut, ...]

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        return self.schedule

    def choose(self, view: CutView, keep: Sequence[int]) -> Tensor:
        return loudest(view.tokens.hidden, view.tokens.visual, keep)


@dataclass
class Alone:
    """The tokens that are left of one prompt."""

    hidden: Tensor
    visual: Tensor
    positions: Tensor

    def through(self, base: BaseVLM, start: int, stop: int, cuts: Sequence[Cut]) -> list[int]:
        """Layers start..stop-1 with the cuts before, between and after them; tokens that entered each."""
        entered = []
        for index in range(start, stop + 1):
            for cut in cuts:
                if cut.layer == index:
                    chosen = loudest(self.hidden[None], self.visual[None], [cut.keep])[0]
                    stays = chosen | ~self.visual
                    self.hidden, self.visual, self.positions = (
                        part[stays] for part in (self.hidden, self.visual, self.positions)
                    )
            if index < stop:
                count = len(self.hidden)
                entered.append(count)
                layer: Any = base.layers[index]
                mask = torch.zeros(count, count).masked_fill(~causal_mask(count, count), torch.finfo().min)
                rotary = base.decoder.rotary_emb(self.hidden[None], self.positions[None])
                self.hidden = layer(self.hidden[None], attention_mask=mask[None, None], position_embeddings=rotary)[0]
        return entered


@torch.no_grad()
def logits_by_dropping(base: BaseVLM, inputs: dict[str, Any], cuts: Sequence[Cut], tokens: Sequence[int]) -> Tensor:
    """Logits after a prompt and after each of the tokens that follow it, in one pass over all of them."""
    captured = base.prompt(**inputs)
    new = base.embed(torch.tensor([tokens], dtype=torch.long))[0]
    hidden = torch.cat((captured.hidden[0], new))
    visual = torch.nn.functional.pad(captured.visual_mask[0], (0, len(tokens)))
    alone = Alone(hidden, visual, torch.arange(len(hidden)))
    alone.through(base, 0, base.num_layers, cuts)
    return base.logits(alone.hidden[-len(tokens) - 1 :])


def answer_by_dropping(base: BaseVLM, inputs: dict[str, Any], cuts: Sequence[Cut], count: int) -> list[int]:
    """The greedy answer, of that many tokens."""
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(logits_by_dropping(base, inputs, cuts, tokens)[-1].argmax()))
    return tokens
