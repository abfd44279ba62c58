"""What a vision tower made of a prompt's pixels: features and attention, which a base does not hand on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
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
    """Before the projector; where it merges several into one, behind it."""
    projector: nn.Module | None
    """From features to visual tokens; None where the features are those behind it."""
    attention: TowerAttention | None
    """Of the block whose output the features are; None: the base pools patches, so that they are not known."""
    last_attention: TowerAttention | None
    """Of the tower's last block."""
    patches: int
    """Patches that a token was merged from."""
    has_cls: bool
    """Whether the tower has a CLS token that is no visual token."""
    cls: Float[Tensor, "images features"] | None
    """Features of the CLS tokens."""

    def project(
        self, features: Float[Tensor, "rows features"], weights: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "rows width"]:
        """Features as visual tokens.

        Args:
            features: before the projector.
            weights: of the projector, by their names; None: its own.
        """
        if self.projector is None:
            return features
        made = functional_call(self.projector, dict(weights or {}), (features[None],))
        return _flat(made).to(self.projected)

    def importance(self, over: str = "mean") -> Float[Tensor, " rows"]:
        """The CLS token's attention (softmax over the tower's tokens) to each row, or where there is none the mean that it
        gets from all others; of merged patches the mean.

        Args:
            over: "mean" or "sum" over heads.
        """
        if over not in self._importance:
            self._importance[over] = self._merged(self._known.cls_row(over) if self.has_cls else self._known.received())
        return self._importance[over]

    @cached_property
    def _importance(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def last_importance(self) -> Float[Tensor, " rows"]:
        """The same of the last block."""
        self._known  # noqa: B018 (for its error)
        last = cast(TowerAttention, self.last_attention)
        return self._merged(last.cls_row() if self.has_cls else last.received())

    @cached_property
    def keys(self) -> Float[Tensor, "rows head_dim"]:
        """Keys of the block whose output the features are, mean over heads, before any rotation; of merged patches the mean."""
        return self._merged(self._known.keys(self.has_cls).float().mean(dim=1))

    @cached_property
    def last_keys(self) -> Float[Tensor, "rows width"]:
        """Keys of the last block, its heads side by side; of merged patches the mean."""
        self._known  # noqa: B018 (for its error)
        return self._merged(cast(TowerAttention, self.last_attention).keys(self.has_cls).float().flatten(1))

    @cached_property
    def single_head(self) -> Float[Tensor, " rows"]:
        """The CLS token's attention in the last block as if its heads were one; without a CLS token as `last_importance`."""
        if not self.has_cls:
            return self.last_importance
        last = cast(TowerAttention, self.last_attention)
        queries, keys = last.queries().float().flatten(1), last.keys(cls=False).float().flatten(1)
        logits = (keys.view(len(queries), -1, keys.shape[1]) @ queries[..., None])[..., 0] * keys.shape[1] ** -0.5
        return logits.softmax(dim=-1)[:, 1:].flatten()

    def _merged(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, self.patches)).mean(dim=1)

    @property
    def _known(self) -> TowerAttention:
        if self.attention is None:
            raise TwigVLMError(
                "this base pools patches between its vision tower and its language model, so the tower's attention "
                "cannot be assigned to visual tokens: choose a method that cuts in the decoder, or 'divprune'"
            )
        return self.attention


See = Callable[[Tensor, Tensor], Vision | None]
"""(what the base hands to its language model, where it is visual) -> what vision made of the pixels since it is watched."""


@dataclass(frozen=True)
class VisionModules:
    """The modules of a base that vision passes through."""

    block: nn.Module
    """Its output are the features."""
    attention: nn.Module
    last_attention: nn.Module
    projector: nn.Module
    pools: bool

    @classmethod
    def of(cls, model: Any, tower: Tower) -> "VisionModules":
        """Of a base, by its family's description."""
        top = _at(model, tower.path)
        blocks = next(part for part in top.modules() if isinstance(part, nn.ModuleList))
        layer = getattr(model.config, "vision_feature_layer", None)
        layer = layer[-1] if isinstance(layer, list | tuple) and layer else layer
        index = -1 if not isinstance(layer, int) else (layer if layer < 0 else layer - 1)
        block, last = blocks[index], blocks[-1]
        return cls(block, _attention_in(block), _attention_in(last), _at(model, tower.projector), tower.pools)

    @property
    def watched(self) -> list[nn.Module]:
        """Those whose calls `vision` needs."""
        return [self.block, self.attention, self.last_attention, self.projector]

    def vision(
        self,
        calls: Sequence[Call],
        hidden: Float[Tensor, "batch tokens width"],
        visual_mask: Bool[Tensor, "batch tokens"],
    ) -> Vision | None:
        """What the calls made of the pixels; None without any.

        Args:
            calls: of the watched modules.
            hidden: what the base hands to its language model.
            visual_mask: True at visual tokens.
        """
        made = {module: tuple(call for call in calls if call.module is module) for module in self.watched}
        if not made[self.projector]:
            return None
        device = hidden.device
        projected = torch.cat([_flat(call.output) for call in made[self.projector]]).to(hidden)
        features = torch.cat([_flat(call.states) for call in made[self.projector]]).to(device)
        whole = len(features) == len(projected)
        source = torch.full(visual_mask.shape, -1, device=device)
        source[visual_mask] = match_rows(hidden[visual_mask], projected)
        if int((source >= 0).sum()) * 2 < int(visual_mask.sum()):
            raise TwigVLMError(
                "this base rearranges its image features behind the projector: choose a method that cuts in the decoder"
            )
        attention, last = (TowerAttention(made[module]) for module in (self.attention, self.last_attention))
        images, tokens = attention.tokens if made[self.attention] else (0, 0)
        has_cls = tokens != len(projected) and tokens - images == len(projected)
        patches = 1 if has_cls else tokens // len(projected)
        known = not self.pools and tokens > 0 and (has_cls or patches * len(projected) == tokens)
        cls = None
        if known and has_cls and whole:
            cls = torch.cat([_output(call)[:, 0] for call in made[self.block]]).to(device)
        return Vision(
            source,
            projected,
            _images(made[self.projector], attention if known else None, patches, has_cls).to(device),
            features if whole else projected,
            self.projector if whole else None,
            attention if known else None,
            last if known else None,
            patches,
            has_cls,
            cls,
        )


def _images(
    projections: Sequence[Call], attention: TowerAttention | None, patches: int, has_cls: bool
) -> Int[Tensor, " rows"]:
    """Which image each visual token belongs to."""
    if attention is None:
        sizes = [size for call in projections for size in [call.output.shape[-2]] * (call.output.shape[:-2].numel())]
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    images = attention.image_of()
    return images.view(attention.tokens[0], -1)[:, 1:].flatten() if has_cls else images[::patches]


def match_rows(rows: Float[Tensor, "rows width"], among: Float[Tensor, "others width"]) -> Int[Tensor, " rows"]:
    """For each row the index of one that equals it, bit by bit; -1 where there is none. Of equal rows the k-th gets the k-th, and
    where there are fewer, as in prompts that are answered several times, the first ones get further rows.

    So a base's own code says which feature became which visual token, whatever it drops, reorders or puts in between.
    """
    ours, theirs = _hashes(rows), _hashes(among)
    order = theirs.argsort(stable=True)
    ordered = theirs[order]
    mine = ours.argsort(stable=True)
    place = torch.arange(len(ours), device=ours.device)
    repeated = torch.empty_like(place)
    repeated[mine] = place - torch.searchsorted(ours[mine], ours[mine])
    first = torch.searchsorted(ordered, ours)
    count = torch.searchsorted(ordered, ours, right=True) - first
    at = (first + repeated % count.clamp(min=1)).clamp(max=len(among) - 1)
    return torch.where(count > 0, order[at], -1)


def _hashes(rows: Tensor) -> Int[Tensor, " rows"]:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(0)).to(
        rows.device
    )
    parts = rows.contiguous().view(bits).split(_HASHED)
    return torch.cat([(part.long() * weights).sum(dim=1) for part in parts])


def _attention_in(block: nn.Module) -> nn.Module:
    return next(getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))


def _flat(states: Any) -> Tensor:
    return cast(Tensor, states).reshape(-1, states.shape[-1])


def _output(call: Call) -> Tensor:
    return cast(Tensor, call.output[0] if isinstance(call.output, tuple) else call.output)


def _at(root: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), root)
