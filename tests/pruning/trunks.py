"""Prompts after the trunk of a tiny model: what a scorer looks at."""

from typing import Any

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.kv.cache import KVCache
from twigvlm.pruning.view import Tokens, TrunkOutput

WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "chain": {"speculate": "chain", "draft_threshold": 0.0, "draft_length": 4},
    "tree": {"speculate": "tree", "tree_depth": 3, "tree_width": 4, "tree_expand": 3, "tree_nodes": 12},
    "auto": {"speculate": "auto"},
}
"""Ways to draft."""
PROMPTS = [prompt(1, before=2, after=4), prompt(2, before=5, after=9), prompt(3)]


def grown(attention: str = "sdpa", trunk_layers: int = 2, seed: int = 0, **config: Any) -> TwigVLM:
    """A fresh twig of two layers on a tiny base."""
    return TwigVLM.grow(tiny_llava(seed, attention=attention), TwigConfig(trunk_layers, twig_layers=2, **config))


def embedded(model: TwigVLM, inputs: dict[str, Any]) -> Tokens:
    """The tokens of prompts before the first layer."""
    captured = model.base.prompt(**inputs)
    return Tokens(captured.hidden, model.base.token_inputs(captured), captured.visual_mask, captured.lengths)


def after_trunk(model: TwigVLM, inputs: dict[str, Any] | None = None) -> TrunkOutput:
    """Prompts after layer K, in the cache."""
    inputs, base, twig = inputs or prompt(), model.base, model.twig
    trunk_layers, masks = twig.config.trunk_layers, base.masks()
    cache = KVCache(twig.last_layer_idx + 1, (trunk_layers, twig.first_layer_idx), 1, base.device)
    view = cache.view(cache.claim(len(inputs["input_ids"])))
    tokens = embedded(model, inputs).through(base, 0, trunk_layers, masks, view)
    return TrunkOutput(base, twig, base.prompt(**inputs), tokens, masks, view)
