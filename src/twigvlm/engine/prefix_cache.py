"""What trunk and twig know of a conversation, so that the next question runs them on what is new alone."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.base.prompt import Prompt
from twigvlm.base.vlm import BaseVLM
from twigvlm.kv.cache import KVCache


@dataclass
class PrefixCache:
    """The last prompt of one conversation: its states after layer K and before the last twig layer, and their caches.

    Each question ranks the visual tokens anew, so layers K+1..L start afresh; trunk and twig, which hold all tokens
    whatever was asked, do not.
    """

    prompt: Prompt | None = None
    cache: KVCache | None = None
    hidden: Float[Tensor, "1 tokens width"] | None = None
    """After layer K."""
    last_input: Float[Tensor, "batch tokens width"] | None = None
    """Input of the last twig layer."""

    def forget(self) -> None:
        """Know nothing any more, as after a question that failed on its way."""
        self.prompt = self.cache = self.hidden = self.last_input = None

    def known(self, input_ids: Int[Tensor, "1 tokens"]) -> int:
        """Tokens that a prompt begins with as the last one did; at least one of its own is left."""
        if self.prompt is None:
            return 0
        most = min(input_ids.shape[1] - 1, self.prompt.input_ids.shape[1])
        same = input_ids[0, :most] == self.prompt.input_ids[0, :most]
        return int(same.long().cumprod(0).sum())

    def needs_vision(self, base: BaseVLM, input_ids: Int[Tensor, "1 tokens"]) -> bool:
        """Whether a visual token is among what is new."""
        return bool(base.visual_mask(input_ids[:, self.known(input_ids) :]).any())

    def open(self, base: BaseVLM, inputs: dict[str, Any]) -> Prompt:
        """The next prompt, for which vision runs only if it is needed."""
        ids = inputs["input_ids"]
        known, before = self.known(ids), self.prompt
        if before is None or not known or self.needs_vision(base, ids):
            return base.prompt(**inputs)
        base.check_context(ids)
        new = ids[:, known:]
        count = new.shape[1]
        last = before.position_ids[..., known - 1 : known]
        positions = last + torch.arange(1, count + 1, device=last.device)
        index = torch.arange(known, known + count, device=ids.device)[None]

        def extended(values: Tensor, more: Tensor) -> Tensor:
            return torch.cat((values[:, :known], more.to(values)), dim=1)

        return Prompt(
            extended(before.hidden, base.embed(new)),
            torch.cat((before.position_ids[..., :known], positions), dim=-1),
            extended(before.visual_mask, torch.zeros_like(new)),
            ids,
            (known + count,),
            None if before.attends_until is None else extended(before.attends_until, index),
            tuple(extended(features, features.new_zeros(1, count, features.shape[2])) for features in before.deepstack),
        )
