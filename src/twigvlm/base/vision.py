"""What a vision tower made of a prompt's pixels: features and attention, which a base does not hand on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from twigvlm.base.capture import Call
from twigvlm.base.families import Tower
from twigvlm.base.tower_attention import TowerAttention
from twigvlm.errors import TwigVLMError

_HASHED = 512  # rows that are compared at a time
_CLS = ("class_embedding", "cls_token")  # names of the parameter of a tower that has a CLS token
_ENDS = 4  # different visual tokens that need not be features: a family has one for ends of lines


@dataclass(frozen=True)
class Vision:
    """What the tower and the projector made of the pixels of a batch of prompts; row i of its tensors is the i-th token."""

    source: Int[Tensor, "batch tokens"]
    """Which row each token of the prompts is; -1: text, and visual tokens that are no patch (ends of lines of tiles)."""
    projected: Float[Tensor, "rows width"]
    """As the language model gets them."""
    image: Int[Tensor, " rows"]
    """Which image, tile or pair of frames each row belongs to."""
    features: Float[Tensor, "rows features"]
    """Before the projector; where it merges several into one, after it."""
    projector: nn.Module | None
    """From features to visual tokens; None where the features are those after it."""
    attention: tuple[TowerAttention, TowerAttention] | None
    """That of the block whose output the features are, and of the tower's last block; None: it is not known of visual tokens."""
    shown: Bool[Tensor, " tower_tokens"]
    """Which of the tower's tokens become visual tokens, or parts of one: all but the CLS tokens that the base drops."""
    patches: int
    """Patches that a token was merged from."""
    has_cls: bool
    """Whether the tower has CLS tokens."""
    cls: Mapping[int, Float[Tensor, "1 features"]]
    """Features of the CLS tokens that are no visual tokens, by their images."""

    def project(
        self, features: Float[Tensor, "rows features"], weights: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "rows width"]:
        """Features as visual tokens.

        Args:
            features: before the projector.
            weights: weights of the projector, by their names; None: its own.
        """
        if self.projector is None:
            return features
        made = functional_call(self.projector, dict(weights or {}), (features[None],))
        return _flat(made).to(self.projected)

    def importance(self, over: str = "mean") -> Float[Tensor, " rows"]:
        """The CLS token's attention (softmax over the tower's tokens) to each row, or where there is none the mean that it
        gets from all others; of merged patches the mean. A CLS token that is a visual token has what it gives itself.

        Args:
            over: "mean" or "sum" over heads.
        """
        if over not in self._importance:
            self._importance[over] = self._attention_given(self._known[0], over)
        return self._importance[over]

    @cached_property
    def _importance(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def last_importance(self) -> Float[Tensor, " rows"]:
        """The same of the last block."""
        return self._attention_given(self._known[1])

    @cached_property
    def keys(self) -> Float[Tensor, "rows head_dim"]:
        """Keys of the block whose output the features are, mean over heads, before any rotation; of merged patches the mean."""
        return self._merged(self._known[0].keys().float().mean(dim=1))

    @cached_property
    def last_keys(self) -> Float[Tensor, "rows width"]:
        """Keys of the last block, its heads side by side; of merged patches the mean."""
        return self._merged(self._known[1].keys().float().flatten(1))

    @cached_property
    def single_head(self) -> Float[Tensor, " rows"]:
        """The CLS token's attention in the last block as if its heads were one; without a CLS token as `last_importance`."""
        if not self.has_cls:
            return self.last_importance
        queries, keys = self._known[1].queries().float().flatten(1), self._known[1].keys().float().flatten(1)
        logits = (keys.view(len(queries), -1, keys.shape[1]) @ queries[..., None])[..., 0] * keys.shape[1] ** -0.5
        return self._merged(logits.softmax(dim=-1).flatten())

    def _attention_given(self, attention: TowerAttention, over: str = "mean") -> Float[Tensor, " rows"]:
        if not self.has_cls:
            return self._merged(attention.received())
        others = attention.cls_row(over).view(attention.tokens[0], -1)
        total = 1 if over == "mean" else attention.queries().shape[1]  # in each head a CLS token gives 1 to all tokens
        to_itself = (total - others.sum(dim=1, keepdim=True)).clamp(min=0)
        return self._merged(torch.cat((to_itself, others), dim=1).flatten())

    def _merged(self, values: Tensor) -> Tensor:
        """Values of the visual tokens, from those of all of the tower's tokens."""
        return values[self.shown.to(values.device)].unflatten(0, (-1, self.patches)).mean(dim=1)

    @property
    def _known(self) -> tuple[TowerAttention, TowerAttention]:
        if self.attention is None:
            raise TwigVLMError(
                "pruner: ranks by the vision tower's attention, but this base pools patches after its tower, or drops some; "
                "choose a method that does not need that attention (see 'twigvlm methods'), for example 'fastv' or 'divprune'"
            )
        return self.attention


ReadVision = Callable[[Tensor, Tensor], Vision | None]
"""(what the base hands to its language model, where it is visual) -> what vision made of the pixels since it is watched."""


@dataclass(frozen=True)
class VisionModules:
    """The modules of a base that vision passes through, of each of its towers."""

    blocks: tuple[nn.Module, ...]
    """Their outputs are the features."""
    attentions: tuple[nn.Module, ...]
    last_attentions: tuple[nn.Module, ...]
    projector: nn.Module
    pools: bool
    has_cls: bool
    """Whether the towers are known to have CLS tokens."""

    @classmethod
    def of(cls, model: Any, tower: Tower) -> "VisionModules":
        """The modules of a base, by its family's description."""
        towers = [attrgetter(path)(model) for path in (tower.path, tower.videos) if path is not None]
        blocks = [next(part for part in top.modules() if isinstance(part, nn.ModuleList)) for top in towers]
        names = {name.rpartition(".")[2] for top in towers for name, _ in top.named_parameters()}
        layer = getattr(model.config, "vision_feature_layer", None)
        layer = layer[-1] if isinstance(layer, list | tuple) and layer else layer
        index = -1 if not isinstance(layer, int) else (layer if layer < 0 else layer - 1)
        return cls(
            tuple(each[index] for each in blocks),
            tuple(_attention_in(each[index]) for each in blocks),
            tuple(_attention_in(each[-1]) for each in blocks),
            attrgetter(tower.projector)(model),
            tower.pools,
            not names.isdisjoint(_CLS),
        )

    @property
    def watched(self) -> list[nn.Module]:
        """Those whose calls `vision` needs."""
        return [*self.blocks, *self.attentions, *self.last_attentions, self.projector]

    def vision(
        self,
        calls: Sequence[Call],
        hidden: Float[Tensor, "batch tokens width"],
        visual_mask: Bool[Tensor, "batch tokens"],
    ) -> Vision | None:
        """What the calls made of the pixels; None without any.

        Args:
            calls: calls of the watched modules.
            hidden: what the base hands to its language model.
            visual_mask: True at visual tokens.

        Raises:
            TwigVLMError: visual tokens are not what the projector made.
        """
        projections, device = _of(calls, self.projector), hidden.device
        if not projections:
            return None
        projected = torch.cat([_flat(call.output) for call in projections]).to(hidden)
        features = torch.cat([_flat(call.states) for call in projections]).to(device)
        whole = len(features) == len(projected)
        source = torch.full(visual_mask.shape, -1, device=device)
        source[visual_mask] = match_rows(hidden[visual_mask], projected)
        _check_others(hidden[visual_mask & (source < 0)])
        layout = None if self.pools else self._layout(calls)
        shown, patches = layout or (torch.ones(0, dtype=torch.bool), 1)
        has_cls = self.has_cls or not bool(shown.all())
        attention, last = (TowerAttention(_of(calls, *these)) for these in (self.attentions, self.last_attentions))
        return Vision(
            source,
            projected,
            _images(projections, attention if layout else None, shown, patches).to(device),
            features if whole else projected,
            self.projector if whole else None,
            (attention, last) if layout else None,
            shown,
            patches,
            has_cls,
            self._dropped_cls(calls, shown, features) if layout and whole and has_cls else {},
        )

    def _layout(self, calls: Sequence[Call]) -> tuple[Bool[Tensor, " tower_tokens"], int] | None:
        """Which of the tower's tokens become visual tokens, and how many of them become one; None: that is not known."""
        passes: list[tuple[list[Call], int]] = []  # of the tower, and how many rows the projector made of each
        for call in _of(calls, *self.attentions, self.projector):
            before, rows = passes.pop() if passes else ([], 0)
            if call.module is self.projector:
                passes.append((before, rows + len(_flat(call.output))))
            else:
                passes += [(before, rows), ([call], 0)] if rows else [([*before, call], 0)]
        parts, ratios = [], set()
        for attended, rows in passes:
            images, tokens = TowerAttention(tuple(attended)).tokens
            parts.append(torch.ones(tokens, dtype=torch.bool))
            if rows and tokens == rows + images:
                parts[-1].view(images, -1)[:, 0] = False
            elif not tokens or not rows or tokens % rows:
                return None
            ratios.add(int(parts[-1].sum()) // rows)
        return (torch.cat(parts), ratios.pop()) if len(ratios) == 1 else None

    def _dropped_cls(
        self, calls: Sequence[Call], shown: Bool[Tensor, " tower_tokens"], features: Float[Tensor, "rows features"]
    ) -> dict[int, Float[Tensor, "1 features"]]:
        states = torch.cat([_output(call)[:, 0] for call in _of(calls, *self.blocks)]).to(features)
        if states.shape[1] != features.shape[1]:  # those of several blocks side by side
            return {}
        dropped = (~shown.view(len(states), -1)[:, 0]).nonzero()[:, 0]
        return {image: states[image : image + 1] for image in dropped.tolist()}


def _check_others(others: Float[Tensor, "others width"]) -> None:
    """Raise TwigVLMError where the visual tokens that are no features are more than ends of lines between tiles."""
    if len(_hashes(others).unique()) > _ENDS:
        raise TwigVLMError(
            "pruner: looks at vision features, but this base changes them after its projector, so that they cannot be matched "
            "to visual tokens; choose a method that does not need them (see 'twigvlm methods'), for example 'fastv'"
        )


def _images(
    projections: Sequence[Call], attention: TowerAttention | None, shown: Bool[Tensor, " tower_tokens"], patches: int
) -> Int[Tensor, " rows"]:
    """Which image each visual token belongs to."""
    if attention is None:
        sizes = [size for call in projections for size in [call.output.shape[-2]] * (call.output.shape[:-2].numel())]
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    images = attention.image_of()
    return images[shown.to(images.device)][::patches]


def _of(calls: Sequence[Call], *modules: nn.Module) -> tuple[Call, ...]:
    return tuple(call for call in calls if call.module in modules)


def match_rows(rows: Float[Tensor, "rows width"], among: Float[Tensor, "others width"]) -> Int[Tensor, " rows"]:
    """For each row the index of one that equals it, bit by bit; -1 where there is none. Of equal rows the k-th gets the k-th, and
    where there are fewer, as in prompts that are answered several times, the first ones get further rows.

    So a base's own code says which feature became which visual token, whatever it drops, reorders or puts in between.
    """
    ours, theirs = _hashes(rows), _hashes(among)
    order = theirs.argsort(stable=True)
    ordered = theirs[order]
    mine = ours.argsort(stable=True)
    index = torch.arange(len(ours), device=ours.device)
    repeated = torch.empty_like(index)
    repeated[mine] = index - torch.searchsorted(ours[mine], ours[mine])
    first = torch.searchsorted(ordered, ours)
    count = torch.searchsorted(ordered, ours, right=True) - first
    at = (first + repeated % count.clamp(min=1)).clamp(max=len(among) - 1)
    return torch.where(count > 0, order[at], -1)


def _hashes(rows: Tensor) -> Int[Tensor, " rows"]:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator, device="cpu").to(rows.device)
    parts = rows.contiguous().view(bits).split(_HASHED)
    return torch.cat([(part.long() * weights).sum(dim=1) for part in parts])


def _attention_in(block: nn.Module) -> nn.Module:
    return next(getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))


def _flat(states: Any) -> Tensor:
    return cast(Tensor, states).reshape(-1, states.shape[-1])


def _output(call: Call) -> Tensor:
    return cast(Tensor, call.output[0] if isinstance(call.output, tuple) else call.output)
