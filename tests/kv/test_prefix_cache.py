"""What a later prompt takes over from an earlier one, against prompts that are computed alone."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import families
from tests.pruning.references import Loudest
from tests.pruning.trunks import grown
from tests.tiny import IMAGE_TOKEN, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.base.prompt import Prompt
from twigvlm.base.token_inputs import slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.kv.cache import KVCache
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.cut import Cut
from twigvlm.pruning.view import Tokens, TrunkOutput

OF_FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3"]
"""With positions of their own: plain, in a window, M-RoPE, with deepstack, with bidirectional images."""


def _prompt_of(ids: torch.Tensor) -> Prompt:
    hidden = torch.zeros(*ids.shape, 4)
    return Prompt(hidden, torch.arange(ids.shape[1])[None], ids == IMAGE_TOKEN, ids, (ids.shape[1],))


few = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(cached=few, new=few)
def test_what_is_known_is_the_common_beginning(cached, new):
    prefix = PrefixCache(_prompt_of(torch.tensor([cached])), torch.zeros(1, len(cached), 4))
    known = prefix.known(torch.tensor([new]))
    common = 0
    while common < min(len(cached), len(new)) and cached[common] == new[common]:
        common += 1
    if cached == new:
        assert known == len(new)
    else:  # another prompt has a token of its own, from which its answer begins
        assert known == min(common, len(new) - 1)


def test_of_nothing_nothing_is_known():
    prefix = PrefixCache(_prompt_of(torch.tensor([[1, 2, 3]])), torch.zeros(1, 3, 4))
    prefix.forget()
    for empty in (prefix, PrefixCache()):
        assert empty.known(torch.tensor([[1, 2, 3]])) == 0


def test_vision_runs_only_for_new_visual_tokens():
    base, inputs = BaseVLM(tiny_llava()), prompt()
    ids = inputs["input_ids"]
    prefix = PrefixCache()
    assert prefix.needs_vision(base, ids)
    prefix.prompt, prefix.hidden = base.prompt(**inputs), torch.zeros(1, 25, 32)
    assert not prefix.needs_vision(base, ids)
    assert not prefix.needs_vision(base, _followed_by(inputs, [5, 6])["input_ids"])
    assert not prefix.needs_vision(base, _followed_by(inputs, [5, 6], ids.shape[1] - 3)["input_ids"])
    assert prefix.needs_vision(base, torch.cat((ids, ids), dim=1))
    assert prefix.needs_vision(base, torch.tensor([[7, IMAGE_TOKEN, 7]]))


def _followed_by(inputs: dict[str, Any], text: list[int], length: int | None = None) -> dict[str, Any]:
    """The first tokens of a prompt, all if no length is given, and text behind them."""
    more = {}
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            new = {"input_ids": text, "attention_mask": [1] * len(text)}.get(name, [0] * len(text))
            more[name] = torch.cat((inputs[name][:, :length], inputs[name].new_tensor([new])), dim=1)
    return {**inputs, **more}


class Turns:
    """Prompts that go through trunk and twig one after another, and each also alone."""

    def __init__(self, name: str) -> None:
        config = TwigConfig(families.TRUNK, families.TWIG)
        hf_model = families.tiny(name)
        self.model, self.prefix = TwigVLM.grow(hf_model, config), PrefixCache()
        self.first = families.prompt(hf_model, name, "images")

    def through(self, inputs: dict[str, Any], prefix: PrefixCache | None, in_twig: bool = True) -> TrunkOutput:
        """A prompt after layer K, which the twig has seen or not; all of it, or what the prefix does not know."""
        base, twig, layers = self.model.base, self.model.twig, self.model.twig.config.trunk_layers
        cache = KVCache(twig.last_layer_idx + 1, (layers, twig.first_layer_idx), 4, base.device)
        view, masks = cache.view(cache.claim(1)), base.masks()
        captured = base.prompt(**inputs) if prefix is None else prefix.open(base, inputs)
        tokens, hidden, known = base.token_inputs(captured), captured.hidden, 0
        if prefix is not None:
            known = prefix.known(captured.input_ids)
            prefix.load(base, twig, view, known)
        count = hidden.shape[1]
        hidden = hidden[:, known:]
        if known < count:
            hidden = base.run_layers(hidden, 0, layers, slice_tokens(tokens, known, count), masks, view)
        if prefix is not None:
            if prefix.hidden is not None:
                hidden = torch.cat((prefix.hidden[:, :known], hidden), dim=1)
            prefix.store_trunk(view, layers, captured, hidden, known)
        left = Tokens(hidden, tokens, captured.visual_mask, captured.lengths)
        trunk = TrunkOutput(base, twig, captured, left, masks, view, prefix)
        if in_twig:
            trunk.fill_twig()
        return trunk

    @torch.no_grad()
    def check(self, inputs: dict[str, Any], in_twig: bool = True) -> None:
        got, expected = (self.through(inputs, prefix, in_twig) for prefix in (self.prefix, None))
        torch.testing.assert_close(got.tokens.hidden, expected.tokens.hidden)
        if in_twig:
            torch.testing.assert_close(got.fill_twig(), expected.fill_twig())
        rows = slice(0, 1)
        for layer in (*range(families.TRUNK), *range(families.LAYERS, families.LAYERS + families.TWIG)):
            if in_twig or layer < families.TRUNK:
                both = (trunk.view.cache.contents(layer, rows) for trunk in (got, expected))
                torch.testing.assert_close(*both)
        self.check_prompt(inputs, got.prompt)

    def check_prompt(self, inputs: dict[str, Any], got: Prompt) -> None:
        expected = self.model.base.prompt(**inputs)
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(got, name), value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", OF_FAMILIES)
@pytest.mark.parametrize("in_twig", [True, False], ids=["after a ranking", "before the twig has seen it"])
def test_turns_of_a_conversation_are_as_whole_prompts(name, in_twig):
    turns = Turns(name)
    turns.check(turns.first, in_twig)
    second = _followed_by(turns.first, [11, 12, 13])
    turns.check(second)
    turns.check(_followed_by(second, [14]))


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_a_prompt_that_diverges_right_behind_its_picture(name):
    turns = Turns(name)
    turns.check(turns.first)
    last = int(turns.model.base.visual_mask(turns.first["input_ids"])[0].nonzero()[-1])
    turns.check(_followed_by(turns.first, [11, 12, 13], last + 1))


@pytest.mark.parametrize("name", OF_FAMILIES)
@pytest.mark.parametrize("in_twig", [True, False], ids=["after a ranking", "before the twig has seen it"])
def test_a_prompt_that_diverges_takes_over_what_is_common(name, in_twig):
    turns = Turns(name)
    turns.check(_followed_by(turns.first, [11, 12, 13, 14]), in_twig)
    turns.check(_followed_by(turns.first, [11, 12, 20]), in_twig)
    turns.check(_followed_by(turns.first, [11, 12]))
    changed = turns.first["input_ids"].clone()
    changed[0, 1] = 7 if changed[0, 1] != 7 else 8  # before the images
    turns.check({**turns.first, "input_ids": changed})
    turns.check(turns.first)


@pytest.mark.parametrize("name", OF_FAMILIES)
@torch.no_grad()
def test_a_fork_of_the_same_prompt_runs_nothing(name):
    turns = Turns(name)
    turns.check(turns.first, in_twig=False)
    trunk, twig = turns.model.base.layers[0], turns.model.twig.layers[0]
    ran: list[Any] = []
    for layer in (trunk, twig):
        layer.register_forward_pre_hook(lambda module, _: ran.append(module))
    turns.through(turns.first, turns.prefix)
    assert ran == [twig]  # the trunk's states are known, the twig sees the prompt for the first time
    turns.through(turns.first, turns.prefix)
    assert ran == [twig]
    turns.check(turns.first)


@torch.no_grad()
def test_known_scores_are_those_of_this_prompt():
    """Another budget does not ask a scorer again; another prompt does."""
    model, asked, prefix = grown(), [], PrefixCache()

    def scorer(trunk):
        asked.append(trunk.tokens.lengths)
        return torch.arange(trunk.tokens.hidden.shape[1])[None].float()

    first, second = prompt(), _followed_by(prompt(), [5])
    for inputs, keep in ((first, 2), (first, 5), (second, 3)):
        options = {"max_new_tokens": 4, "keep": keep, "scorer": scorer}
        got = model.generate(**inputs, **options, memory=prefix, return_dict_in_generate=True)
        assert got.kept_indices[0].tolist() == list(range(19 - keep, 19))
    assert asked == [(25,), (26,)]


def test_cuts_before_the_trunks_end_take_nothing_over_and_leave_nothing():
    """Their trunk has not seen the whole prompt; the next question, pruned after it, goes on from the last one that has."""
    model, prefix = grown(), PrefixCache()
    early, late = Loudest((Cut(1, 5),)), Loudest((Cut(2, 5),))
    first = prompt()
    second, third = (_followed_by(first, text) for text in ([5, 6], [5, 6, 7]))
    for inputs, pruner in ((first, early), (first, late), (second, early), (third, late)):
        expected = model.generate(**inputs, pruner=pruner, max_new_tokens=6)
        got = model.generate(**inputs, pruner=pruner, max_new_tokens=6, memory=prefix)
        assert torch.equal(got, expected)


def test_numbers_among_the_inputs_are_no_pictures():
    """Tensors without an axis, as the base's `generate` takes for EOS tokens."""
    model, prefix = grown(), PrefixCache()
    for inputs in (prompt(), _followed_by(prompt(), [5])):
        options = {"max_new_tokens": 6, "eos_token_id": torch.tensor(7)}
        expected = model.generate(**inputs, **options)
        assert model.generate(**inputs, **options, memory=prefix).tolist() == expected.tolist()


def test_positions_beside_a_memory_are_refused():
    model, inputs = grown(), prompt()
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with pytest.raises(TwigVLMError, match="position_ids: cannot be given beside memory; leave one of them out"):
        model.generate(**inputs, position_ids=positions, max_new_tokens=1, memory=PrefixCache())


def test_trees_behind_a_short_turn_of_a_conversation():
    """Paths of a tree are longer than what the twig ran of it; where the cache is full to the last slot, they end there."""
    torch.manual_seed(0)
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2, pruning_head=True, final_wipe=4))
    tree = {"speculate": "tree", "tree_depth": 2, "tree_width": 2, "tree_expand": 2, "tree_nodes": 4}
    for seed in range(4):
        for extra in (1, 3):
            inputs, memory = prompt(seed), PrefixCache()
            first = model.generate(**inputs, keep=5, max_new_tokens=6, memory=memory)
            more = torch.randint(2, 90, (1, extra), generator=torch.Generator().manual_seed(seed))
            ids = torch.cat((first.clamp(max=97), more), dim=1)
            ids[:, : inputs["input_ids"].shape[1]] = inputs["input_ids"]
            turn = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            got = model.generate(**turn, keep=5, max_new_tokens=6, memory=memory, **tree)
            assert got.tolist() == model.generate(**turn, keep=5, max_new_tokens=6).tolist()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_same_patches_in_another_grid_are_another_picture(name):
    """Ids and pixels are the same; also where one picture's patches are the first ones of a larger picture."""
    model = TwigVLM.grow(families.tiny(name), TwigConfig(2, 2))
    merge = model.model.config.vision_config.spatial_merge_size**2
    image, width = model.model.config.image_token_id, 3 * 2 * model.model.config.vision_config.patch_size**2
    patches = torch.randn(48, width, generator=torch.Generator().manual_seed(0))

    def picture(grid):
        count = grid[0] * grid[1]
        ids = torch.cat((torch.tensor([5, 6]), torch.full((count // merge,), image), torch.tensor([7, 8])))[None]
        types = {families.TINY[name].token_types: (ids == image).long()} if families.TINY[name].token_types else {}
        grids = torch.tensor([[1, *grid]])
        return {"input_ids": ids, "pixel_values": patches[:count], "image_grid_thw": grids, **types}

    for first, second in (((4, 6), (6, 4)), ((4, 6), (8, 6))):
        memory = PrefixCache()
        model.generate(**picture(first), max_new_tokens=1, memory=memory)
        got = model.generate(**picture(second), max_new_tokens=6, memory=memory)
        assert torch.equal(got, model.generate(**picture(second), max_new_tokens=6))


@dataclass
class Seeded:
    """A ranking that cannot be hashed, since it can be compared."""

    seed: int

    def __call__(self, trunk):
        return torch.rand(trunk.tokens.visual.shape, generator=torch.Generator().manual_seed(self.seed))


def test_rankings_that_cannot_be_hashed_are_told_apart():
    """Each one's id is free for the next."""
    model = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2))

    def kept(seed, **options):
        options = {"keep": 4, "scorer": Seeded(seed), "max_new_tokens": 2, "return_dict_in_generate": True, **options}
        return model.generate(**prompt(), **options).kept_indices[0].tolist()

    memory = PrefixCache()
    for seed in range(12):
        assert kept(seed, memory=memory) == kept(seed)
