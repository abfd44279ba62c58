"""Trees in a whole request: drafted as defined, verified as the base would choose, and gone from the caches after."""

import pytest
import torch
from tests.decoding.test_exactness import LAYERS, grown
from tests.decoding.test_tree import path_to

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.engine import loop
from twigvlm.kv.cache import KVCache


@pytest.fixture
def drafts(monkeypatch):
    """(index of the last accepted token, tokens that are left, tree) of every step of a single answer."""
    seen = []
    real = loop.draft_tree

    def recording(context, tokens, indices, rooms):
        draft = real(context, tokens, indices, rooms)
        seen.append((*indices, *rooms, *draft.trees))
        return draft

    monkeypatch.setattr(loop, "draft_tree", recording)
    return seen


@pytest.fixture
def caches(monkeypatch):
    made = []

    class Recorded(KVCache):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(loop, "KVCache", Recorded)
    return made


@torch.no_grad()
def _shallow(model, inputs, tokens, cache=None):
    """States of M_s after the prompt and these tokens, in one full pass."""
    base, twig = model.base, model.twig
    captured = base.prompt(**inputs)
    hidden = torch.cat((captured.hidden, base.embed(torch.tensor([tokens]))), dim=1)
    rope, masks = base.rotary(hidden, torch.arange(hidden.shape[1])[None]), base.masks(captured)
    return twig(base.run_layers(hidden, 0, model.twig.config.trunk_layers, rope, masks, cache), rope, masks, cache)


@torch.no_grad()
def _tree_by_definition(model, inputs, answer, depth, width, expand, nodes, ends):
    """The paths of Algorithm 2's tree after these tokens, each level from full passes of M_s over whole paths."""
    ids = model.twig.draft_token_ids
    scores, level, parents = {}, [()], set()
    for _ in range(depth):
        children = {}
        for path in level:
            parents.add(path)
            logits = model.twig.logits(_shallow(model, inputs, [*answer, *path])[0, -1])
            best = logits.log_softmax(dim=-1).topk(width)
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                children[(*path, place if ids is None else int(ids[place]))] = scores.get(path, 0.0) + score
        scores.update(children)
        ranked = sorted(children, key=children.get, reverse=True)
        level = [path for path in ranked if path[-1] not in ends][:expand]
    kept = set()
    for leaf in sorted(scores.keys() - parents, key=scores.get, reverse=True):
        for length in range(1, len(leaf) + 1):
            if len(kept) < nodes:
                kept.add(leaf[:length])
    return kept


@pytest.mark.parametrize(
    ("shape", "pruning", "sizes"),
    [
        ({"trunk": 2}, {"keep": 5, "final_wipe": 4}, (3, 4, 3, 12)),
        ({"trunk": 2, "attention": "eager", "reduced": True}, {}, (3, 4, 3, 6)),
        ({"trunk": 0, "twig": 3, "agreeing": False}, {"keep": 5}, (2, 6, 2, 30)),
        ({"trunk": 1, "twig": 3, "seed": 1}, {}, (4, 1, 1, 60)),
    ],
)
def test_trees_by_their_definition(drafts, shape, pruning, sizes):
    """Mistakes in the trunk's or the twig's cache, masks and positions would not change answers, only cost drafts."""
    model, inputs, new = grown(**shape), prompt(3), 12
    length = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **pruning, max_new_tokens=new)[0, length:].tolist()
    ends = sorted(set(range(0, 100, 5)) - set(plain))
    depth, width, expand, nodes = sizes
    options = {"tree_depth": depth, "tree_width": width, "tree_expand": expand, "tree_nodes": nodes}
    answer = model.generate(
        **inputs, **pruning, **options, speculate="tree", max_new_tokens=new, eos_token_id=ends, pad_token_id=0
    )[0, length:].tolist()
    assert answer == plain
    assert len(drafts) > 1
    for index, room, tree in drafts:
        assert room == new - index - 2
        assert tree.tokens[0] == answer[index]
        assert not any(tree.tokens[parent] in ends for parent in tree.parents[1:])
        paths = {tuple(tree.tokens[one] for one in path_to(tree, node)[1:]) for node in range(1, len(tree))}
        expected = _tree_by_definition(model, inputs, answer[: index + 1], min(depth, room), width, expand, nodes, ends)
        assert paths == expected


@pytest.mark.parametrize("pruning", [{}, {"keep": 5, "final_wipe": 4}])
def test_caches_hold_what_plain_decoding_holds(caches, pruning):
    model, inputs = grown(seed=2), prompt(1)
    trunk, depth = model.twig.config.trunk_layers, 4
    options = {"tree_depth": depth, "tree_nodes": 24, "tree_expand": 4, "return_dict_in_generate": True}
    moved = False
    for new in (1, 2, 9, 16):
        caches.clear()
        plain = model.generate(**inputs, **pruning, max_new_tokens=new)
        output = model.generate(**inputs, **pruning, **options, speculate="tree", max_new_tokens=new)
        assert output.sequences.tolist() == plain.tolist()
        moved |= max(output.accepted_lengths[0], default=0) > 1
        expected, got = caches
        for layer in range(LAYERS):
            for before, after in zip(expected.held(layer), got.held(layer), strict=True):
                torch.testing.assert_close(after, before)
        whole = KVCache(model.twig.last_slot + 1, 1)
        answer = plain[0, inputs["input_ids"].shape[1] :].tolist()
        _shallow(model, inputs, answer[:-1] or [2], whole)
        prompt_length = inputs["input_ids"].shape[1]
        for layer in range(LAYERS, model.twig.last_slot + 1):
            held = got.get_seq_length(layer)
            if not held:  # neither a ranking nor a draft needed the twig
                assert new <= 2
                assert not pruning
                continue
            # the last accepted token, and the one after it, which left no room for a draft, need not be in the twig yet
            assert prompt_length + max(new - 3, 0) <= held <= prompt_length + new - 1
            for before, after in zip(whole.held(layer), got.held(layer), strict=True):
                torch.testing.assert_close(after, before[:, :, :held])
        assert got.lengths[:trunk] == [(prompt_length + new - 1,)] * trunk
    assert moved


@pytest.fixture
def perfect():
    """The layers that the twig skips do nothing, so that its first choice is the base's own; it is sure of it, too."""
    base = tiny_llava(layers=LAYERS, deep_scale=0.0, from_layer=4)
    base.lm_head.weight.data *= 10
    return TwigVLM.grow(base, TwigConfig(2, 2))


@pytest.mark.parametrize(("width", "drafted"), [(10, 60), (1, 4)])
def test_with_a_perfect_twig_every_step_accepts_a_whole_path(perfect, width, drafted):
    options = {"tree_width": width, "speculate": "tree", "return_dict_in_generate": True}
    output = perfect.generate(**prompt(), max_new_tokens=21, **options)
    assert output.sequences.tolist() == perfect.model.generate(**prompt(), max_new_tokens=21).tolist()
    assert output.accepted_lengths == [[4, 4, 4, 4]]
    assert output.drafted_lengths == [[drafted] * 4]


@pytest.mark.parametrize("place", range(6))
def test_an_answer_ends_inside_an_accepted_path(perfect, place):
    inputs = prompt(2)
    whole = perfect.model.generate(**inputs, max_new_tokens=14)[0, inputs["input_ids"].shape[1] :].tolist()
    end = {"eos_token_id": whole[place], "pad_token_id": 0, "max_new_tokens": 14}
    output = perfect.generate(
        **inputs, **end, speculate="tree", tree_width=2, tree_nodes=30, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == perfect.model.generate(**inputs, **end).tolist()
    assert output.sequences.shape[1] - inputs["input_ids"].shape[1] == whole.index(whole[place]) + 1
    assert len(output.accepted_lengths[0]) <= 2  # of five tokens each, after the first one


@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_never_more_than_asked_for(perfect, drafts, new):
    output = perfect.generate(**prompt(), max_new_tokens=new, speculate="tree", return_dict_in_generate=True)
    assert output.sequences.shape[1] == prompt()["input_ids"].shape[1] + new
    assert all(max(tree.depths) <= room for _, room, tree in drafts)
    assert (sum(output.drafted_lengths[0]) == 0) == (new < 3)
