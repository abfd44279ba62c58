"""What pruning is, for a prompt by itself: its tokens are dropped layer by layer, or hidden from the base's own forward."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from twigvlm import TwigVLM
from twigvlm.base.masks import causal_mask
from twigvlm.base.vlm import BaseVLM
from twigvlm.pruning.cut import Cut, Need
from twigvlm.pruning.refocus import Look
from twigvlm.pruning.select import top_visual
from twigvlm.pruning.view import CutView


def loudest(hidden: Tensor, visual: Tensor, keep: Sequence[int]) -> Tensor:
    """The visual tokens with the largest states, which differ from layer to layer."""
    return top_visual(hidden.norm(dim=-1), visual, keep)


@dataclass(frozen=True)
class Loudest:
    """A pruner of the cuts that it is told."""

    schedule: tuple[Cut, ...]
    needs: ClassVar[frozenset[Need]] = frozenset()

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        return self.schedule

    def choose(self, view: CutView, keep: Sequence[int]) -> Tensor:
        return loudest(view.tokens.hidden, view.tokens.visual, keep)


@dataclass(frozen=True)
class Noting(Loudest):
    """Of one prompt, the positions of the visual tokens that each cut leaves."""

    left: list[Tensor] = field(default_factory=list)

    def choose(self, view: CutView, keep: Sequence[int]) -> Tensor:
        before = self.left[-1] if self.left else view.prompt.visual_mask[0].nonzero()[:, 0]
        chosen = super().choose(view, keep)
        self.left.append(before[chosen[view.tokens.visual]])
        return chosen


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


def peaks(states: Tensor, clusters: int) -> tuple[list[int], list[int]]:
    """Centres of density-peak clusters, and the cluster of each token."""
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[1] ** 0.5
    density = [float((-row.sort().values[:clusters].square().mean()).exp()) for row in distance]
    gaps = []
    for j in range(len(states)):
        denser = [float(distance[j, i]) for i in range(len(states)) if density[i] > density[j]]
        gaps.append(min(denser) if denser else float(distance[j].max()))
    centers = sorted(range(len(states)), key=lambda j: -density[j] * gaps[j])[:clusters]
    nearest = [centers.index(j) if j in centers else int(distance[j, centers].argmin()) for j in range(len(states))]
    return centers, nearest


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


@torch.no_grad()
def logits_by_hiding(
    model: TwigVLM,
    inputs: dict[str, Any],
    cuts: Sequence[Cut],
    left: Sequence[Tensor],
    tokens: Sequence[int],
    looks: Sequence[Look] = (),
) -> Tensor:
    """Logits after a prompt and after each of the tokens that follow it: the base's own forward, of any family.

    Its own masks (of eager attention), in which tokens that have left are hidden from the layer on that no longer has them,
    and those that are chosen again are seen by each other and by what follows.

    Args:
        model: whose base attends eagerly.
        inputs: the prompt.
        cuts: where tokens leave.
        left: positions of the visual tokens that each cut leaves.
        tokens: ids that follow.
        looks: later choices between the first cut and the second one; none of them takes up a token that had gone.
    """
    extended = dict(inputs)
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            new = {"input_ids": list(tokens), "attention_mask": [1] * len(tokens)}.get(name, [0] * len(tokens))
            extended[name] = torch.cat((inputs[name], torch.tensor([new], dtype=torch.long)), dim=1)
    visual = model.base.visual_mask(inputs["input_ids"])[0].nonzero()[:, 0]

    length = inputs["input_ids"].shape[1]

    def hide(here: Tensor, later: Sequence[Look]) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"].expand(1, -1, -1, -1).clone()
            smallest, before = torch.finfo(mask.dtype).min, here
            mask[..., visual[~torch.isin(visual, here)]] = smallest
            for look in later:
                asking = [
                    *look.kept[~torch.isin(look.kept, before)].tolist(),
                    *range(length + look.after - 1, mask.shape[2]),
                ]
                rows = kwargs["attention_mask"][0, 0, asking].clone()
                rows[:, visual[~torch.isin(visual, look.kept)]] = smallest
                mask[0, :, asking], before = rows, look.kept
            ran = torch.cat((here, *(look.kept for look in later)))
            hidden = visual[~torch.isin(visual, ran)]
            mask[..., hidden, hidden] = 0  # no row may be empty; nobody looks at these
            return args, {**kwargs, "attention_mask": mask}

        return hook

    hooks = []
    for index, layer in enumerate(model.base.layers):
        passed = [some for cut, some in zip(cuts, left, strict=True) if cut.layer <= index]
        later = looks if len(passed) == 1 else ()
        hooks.append(layer.register_forward_pre_hook(hide([visual, *passed][-1], later), with_kwargs=True))
    try:
        return model.model(**extended, use_cache=False).logits[0, inputs["input_ids"].shape[1] - 1 :]
    finally:
        for each in hooks:
            each.remove()


@torch.no_grad()
def logits_by_looking(
    model: TwigVLM,
    inputs: dict[str, Any],
    keep: Tensor,
    looks: Sequence[Look],
    final_wipe: int,
    tokens: Sequence[int],
    late: Sequence[set[int]] = (),
) -> Tensor:
    """Logits after a prompt and after each of the tokens that follow it, in one pass over all that pruned layers ever held.

    A visual token that is chosen again after it had gone is another entry of that pass; each entry sees what was held when
    it ran.

    Args:
        model: of LLaVA's family; its base attends eagerly.
        inputs: the prompt.
        keep: positions of the visual tokens that the prompt kept.
        looks: what was chosen later.
        final_wipe: K_f.
        tokens: ids that follow.
        late: positions of the visual tokens that layers after K_f hold, at first and after each look; none: they hold none.
    """
    base, trunk = model.base, model.twig.config.trunk_layers
    captured = base.prompt(**inputs)
    length = captured.hidden.shape[1]
    hidden = torch.cat((captured.hidden[0], base.embed(torch.tensor([tokens], dtype=torch.long))[0]))
    everything = Alone(hidden, torch.zeros(len(hidden), dtype=torch.bool), torch.arange(len(hidden)))
    everything.through(base, 0, trunk, ())

    text = [position for position in range(length) if not captured.visual_mask[0, position]]
    positions = sorted([*text, *keep.tolist()])
    is_text = [position in text for position in positions]
    sees = [{other for other, place in enumerate(positions) if place <= position} for position in positions]
    entries_of_text = [entry for entry, flag in enumerate(is_text) if flag]
    held = {position: entry for entry, position in enumerate(positions) if position not in text}
    after = {look.after: (look, hold) for look, hold in zip(looks, late[1:] or [set()] * len(looks), strict=True)}
    late_held = {position: held[position] for position in (late[0] if late else ())}
    ever_late = {*late_held.values()}
    late_sees = [some & {*entries_of_text, *ever_late} for some in sees]
    for index in range(len(tokens)):
        if index + 1 in after:
            look, now_late = after[index + 1]
            chosen = look.kept.tolist()
            new = [position for position in chosen if position not in held]
            held = {position: held[position] for position in chosen if position in held}
            for position in new:
                held[position] = len(positions)
                positions.append(position)
                is_text.append(False)
            late_held = {position: (held | late_held)[position] for position in now_late}
            ever_late |= {*late_held.values()}
            for seen, visual in ((sees, held), (late_sees, late_held)):
                before = [*entries_of_text, *visual.values()]
                seen += [{entry for entry in before if positions[entry] <= position} for position in new]
        entries_of_text.append(len(positions))
        sees.append({*entries_of_text, *held.values()})
        late_sees.append({*entries_of_text, *late_held.values()})
        positions.append(length + index)
        is_text.append(True)

    def mask_of(seen: Sequence[set[int]]) -> Tensor:
        mask = torch.full((len(positions),) * 2, torch.finfo().min)
        for entry, others in enumerate(seen):
            mask[entry, sorted(others)] = 0
        return mask

    states, mask, place = everything.hidden[positions], mask_of(sees), torch.tensor(positions)
    for index in range(trunk, base.num_layers):
        if index == final_wipe:
            stays = torch.tensor([flag or entry in ever_late for entry, flag in enumerate(is_text)])
            states, place, mask = states[stays], place[stays], mask_of(late_sees)[stays][:, stays]
        layer: Any = base.layers[index]
        rotary = base.decoder.rotary_emb(states[None], place[None])
        states = layer(states[None], attention_mask=mask[None, None], position_embeddings=rotary)[0]
    return base.logits(states[place >= length - 1])
