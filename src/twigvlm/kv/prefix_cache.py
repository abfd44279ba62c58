"""Cached trunk and twig states of a prompt, so that a next turn, or another pruning of it, computes only what is new."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.base.prompt import Prompt
from twigvlm.base.vision import ReadVision
from twigvlm.base.vlm import BaseVLM
from twigvlm.kv.cache import CacheView
from twigvlm.twig.block import Twig

_OF_TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "cache_position"}
"""Inputs with an entry for each token."""


@dataclass
class PrefixCache:
    """One prompt: its states after layer K and before the last twig layer, and the keys and values of trunk and twig.

    Each question ranks the visual tokens again, so layers K+1..L start afresh; trunk and twig, which hold all tokens
    whatever was asked, do not.
    """

    prompt: Prompt | None = None
    hidden: Float[Tensor, "1 tokens width"] | None = None
    """After layer K."""
    last_input: Float[Tensor, "1 seen width"] | None = None
    """Input of the last twig layer, as far as the twig has seen the prompt."""
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values [1, kv_heads, tokens, head_dim] by layer."""
    scores: dict[Any, Tensor] = field(default_factory=dict)
    """What scorers have given the prompt, so that another budget does not ask them again."""
    pictures: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """What the processor says of the prompt's pictures, by name: how much there is along the first axis, and its digest."""
    _opened: "ref[Prompt] | None" = field(default=None, repr=False)
    """The prompt that was opened last. The rows that wait for it own it: it is large."""

    def copy(self) -> "PrefixCache":
        """The same contents for another prompt; what becomes of one does not change the other."""
        return replace(self, layers=dict(self.layers), scores=dict(self.scores), pictures=dict(self.pictures))

    def bytes(self) -> int:
        """Bytes of the states that are cached, without scores."""
        prompt = self.prompt
        of_prompt = () if prompt is None else (prompt.hidden, prompt.position_ids, prompt.input_ids, *prompt.deepstack)
        states = (*of_prompt, self.hidden, self.last_input, *(part for layer in self.layers.values() for part in layer))
        return sum(part.numel() * part.element_size() for part in states if part is not None)

    def forget(self) -> None:
        """Drop everything, as after a question that failed during its prefill."""
        self.prompt = self.hidden = self.last_input = None
        self.layers, self.scores, self.pictures, self._opened = {}, {}, {}, None

    def show(self, pictures: "Pictures") -> None:
        """Note the next prompt's pictures. Everything is dropped unless the cached prompt's pictures are the first of them.

        Ids alone do not tell pictures apart, and pixels alone not shapes: the same patches may lie in another grid.
        """
        if not self.begins(pictures):
            self.forget()
        self.pictures |= {name: (len(values), pictures.digest(name)) for name, values in pictures.values.items()}

    def begins(self, pictures: "Pictures") -> bool:
        """Whether a prompt's pictures begin with those of the cached one."""
        small_first = sorted(self.pictures.keys() & pictures.values, key=lambda name: pictures.values[name].numel())
        known = ((name, *self.pictures[name]) for name in small_first)
        return all(pictures.digest(name, count) == digest for name, count, digest in known)

    def known(self, input_ids: Int[Tensor, "1 tokens"]) -> int:
        """Length in tokens of the prefix shared with the cached prompt; always leaves one new token of another prompt."""
        if self.prompt is None or self.hidden is None:
            return 0
        cached = self.prompt.input_ids
        if torch.equal(cached, input_ids):
            return cached.shape[1]
        shared = min(input_ids.shape[1] - 1, cached.shape[1])
        same = input_ids[0, :shared] == cached[0, :shared]
        count = int(same.long().cumprod(0).sum())
        # Positions of text behind a picture depend on the family: the base must lay them out together with the picture.
        return count - bool(count and self.prompt.visual_mask[0, count - 1])

    def holds(self, prompt: Prompt) -> bool:
        """Whether it was filled by this very prompt; not so where a cut before the trunk let it see less."""
        return self.prompt is not None and self.prompt.input_ids is prompt.input_ids

    def needs_vision(self, base: BaseVLM, input_ids: Int[Tensor, "1 tokens"], watched: bool = False) -> bool:
        """Whether a visual token is among what is new, or the vision tower is `watched`, and no other answer to the same prompt
        has opened it."""
        if self._waiting(input_ids, watched) is not None:
            return False
        return watched or bool(base.visual_mask(input_ids[:, self.known(input_ids) :]).any())

    def open(self, base: BaseVLM, inputs: dict[str, Any], vision: ReadVision | None = None) -> Prompt:
        """The next prompt, for which the vision tower runs only if that is needed, or where `vision` watches it. Several answers
        to one prompt, which are opened before the first of them runs, share it.

        Args:
            base: the base.
            inputs: arguments of the base's forward, of one prompt without padding.
            vision: from `BaseVLM.watch_vision`, for methods that rank visual tokens by the vision tower.

        Raises:
            TwigVLMError: the prompt is longer than the base's context, or the base refuses it.
        """
        prompt = self._waiting(inputs["input_ids"], vision is not None)
        if prompt is None:
            prompt = self._open(base, inputs, vision)
            self._opened = ref(prompt)
        return prompt

    def _waiting(self, input_ids: Int[Tensor, "1 tokens"], watched: bool) -> Prompt | None:
        """The prompt that was opened last, if a row still holds it and it has these ids and pictures.

        Args:
            input_ids: ids of the prompt; its pictures were shown before.
            watched: whether what the vision tower computes is asked for.
        """
        prompt = None if self._opened is None else self._opened()
        if prompt is None or not torch.equal(prompt.input_ids, input_ids) or (watched and prompt.vision is None):
            return None
        return prompt

    def _open(self, base: BaseVLM, inputs: dict[str, Any], vision: ReadVision | None) -> Prompt:
        ids, before = inputs["input_ids"], self.prompt
        known = 0 if before is None else self.known(ids)
        if vision is not None or before is None or not known or self.needs_vision(base, ids):
            return base.prompt(vision=vision, **inputs)
        if known == ids.shape[1]:
            return before
        base.check_context(ids)
        new = ids[:, known:]
        count = new.shape[1]
        last = before.position_ids[..., known - 1 : known]
        positions = last + torch.arange(1, count + 1, device=last.device)
        base.check_positions(positions)
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

    def load(self, base: BaseVLM, twig: Twig, view: CacheView, known: int) -> None:
        """Put the first `known` tokens of trunk and twig, as far as the twig has seen them, into an empty row of a cache.

        Args:
            base: the base.
            twig: its twig.
            view: view of the row.
            known: number of tokens, from `known`.
        """
        num_in_twig = 0 if self.last_input is None else min(known, self.last_input.shape[1])
        parts = (0, twig.config.trunk_layers, known), (*twig.cache_layers, num_in_twig)
        for start, stop, count in parts:
            if not count or start == stop:
                continue
            for layer in range(start, stop):
                keys, values = self.layers[layer]
                if base.windowed:
                    view.positions(layer, torch.arange(count, device=view.cache.device)[None])
                view.update(keys[:, :, :count], values[:, :, :count], layer)
            view.advance(start, stop, count)

    def store_trunk(self, view: CacheView, trunk: int, prompt: Prompt, hidden: Tensor, known: int) -> None:
        """Cache what the trunk made of a prompt; its keys and values are copied.

        Args:
            view: view of the row that holds the prompt.
            trunk: K.
            prompt: the prompt.
            hidden: its states after layer K, [1, tokens, width].
            known: number of its first tokens that were cached already.
        """
        if self.prompt is None or not torch.equal(self.prompt.input_ids, prompt.input_ids):
            self.scores = {}
            self.last_input = None if self.last_input is None else self.last_input[:, :known]
            self._store(view, 0, trunk)
        # What the vision tower made is as large as all its activations, and of no use once tokens are chosen.
        self.prompt, self.hidden = replace(prompt, vision=None), hidden

    def store_twig(self, view: CacheView, twig: Twig, last_input: Tensor) -> None:
        """Cache what the twig made of the prompt that `store_trunk` cached.

        Args:
            view: view of the row that holds the prompt.
            twig: the twig.
            last_input: input of its last layer, [1, tokens, width].
        """
        self.last_input = last_input
        self._store(view, *twig.cache_layers)

    def _store(self, view: CacheView, start: int, stop: int) -> None:
        for layer in range(start, stop):
            keys, values = view.cache.contents(layer, view.rows)
            self.layers[layer] = keys.clone(), values.clone()


class Pictures:
    """What the processor says of a prompt's pictures; each digest is computed once.

    Args:
        inputs: the processor's outputs.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.values = {
            name: torch.atleast_1d(values)
            for name, values in inputs.items()
            if isinstance(values, Tensor) and name not in _OF_TEXT
        }
        self._digests: dict[tuple[str, int], bytes] = {}

    def digest_all(self) -> None:
        """Compute beforehand, in another thread, the digests that most requests need."""
        for name in self.values:
            self.digest(name)

    def digest(self, name: str, count: int | None = None) -> bytes:
        """Digest of the first `count` entries along the first axis; None: of all."""
        values = self.values[name][:count]
        key = name, len(values)
        if key not in self._digests:
            self._digests[key] = _digest(values)
        return self._digests[key]


def _digest(values: Tensor) -> bytes:
    whole = values.detach().cpu().contiguous()
    found = hashlib.blake2b(f"{whole.dtype} {tuple(whole.shape)}".encode())
    found.update(whole.flatten().view(torch.uint8).numpy().tobytes())
    return found.digest()
