"""Speculation changes nothing, no pruning changes nothing, and pruning is what its definition says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import VISUAL, VOCABULARY, prompt, tiny_llava
from tests.twigs import LAYERS, grown, step_costs
from twigvlm import TwigConfig, TwigVLM
from twigvlm.base.token_inputs import select_tokens
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.random import RandomScores


@st.composite
def cases(draw):
    trunk = draw(st.integers(0, 3))
    shape = {
        "seed": draw(st.integers(0, 2)),
        "trunk": trunk,
        "twig": draw(st.integers(1, 3)),
        "init": draw(st.sampled_from(["next", "last"])),
        "head": draw(st.sampled_from(["own", "shared"])),
        "reduced": draw(st.booleans()),
        "agreeing": draw(st.booleans()),
        "attention": draw(st.sampled_from(["eager", "sdpa"])),
    }
    pruning = {
        "keep": draw(st.integers(1, VISUAL)),
        "final_wipe": draw(st.integers(trunk + 1, LAYERS)),
    }
    # Without a layer after which tokens leave there is nothing to share.
    pruning["final_share"] = draw(st.sampled_from([0.0, 0.4, 1.0])) if pruning["final_wipe"] < LAYERS else 0.0
    if draw(st.booleans()):
        pruning["scorer"] = draw(st.sampled_from([RandomScores(1), BaseLayerAttention(max(trunk, 1))]))
    if draw(st.integers(0, 3)) == 0:
        pruning = {}
    chain = {
        "speculate": "chain",
        "draft_length": draw(st.integers(1, 7)),
        "draft_threshold": draw(st.sampled_from([0.0, 0.0, 0.05, 0.3, 0.6, 1.0])),
    }
    tree = {
        "speculate": "tree",
        "tree_depth": draw(st.integers(1, 5)),
        "tree_width": draw(st.sampled_from([1, 2, 5, VOCABULARY])),
        "tree_expand": draw(st.integers(1, 5)),
        "tree_nodes": draw(st.sampled_from([1, 3, 10, 30])),
    }
    lookup = {
        "speculate": "lookup",
        "draft_length": draw(st.integers(1, 7)),
        "lookup_ngram": draw(st.integers(1, 4)),
    }
    speculation = draw(st.sampled_from([chain, tree, lookup]))
    inputs = prompt(draw(st.integers(0, 50)), before=draw(st.integers(0, 3)), after=draw(st.integers(1, 6)))
    # the model is built in the test: the type checker rolls dice, which strategies must not
    return shape, inputs, pruning, speculation, draw(st.integers(1, 24))


@settings(max_examples=40)
@given(cases(), st.lists(st.integers(0, 30), max_size=3))
def test_speculation_changes_nothing(case, end_places):
    shape, inputs, pruning, speculation, new = case
    model = grown(**shape)
    length = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **pruning, max_new_tokens=new, do_sample=False)
    # end tokens that really occur, so that answers end inside drafts
    answer = plain[0, length:].tolist()
    ends = [answer[place] for place in end_places if place < len(answer)]
    stop = {"eos_token_id": ends, "pad_token_id": 0} if ends else {}
    plain = model.generate(**inputs, **pruning, **stop, max_new_tokens=new)
    output = model.generate(
        **inputs, **pruning, **speculation, **stop, max_new_tokens=new, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == plain.tolist()
    new_tokens = output.sequences.shape[1] - length
    assert new_tokens <= new
    assert all(token not in ends for token in output.sequences[0, length:-1].tolist())
    (drafts,), (accepts,) = output.drafted_lengths, output.accepted_lengths
    assert len(drafts) == len(accepts)
    length, size = (speculation.get(one) for one in ("tree_depth", "tree_nodes"))
    for drafted, accepted in zip(drafts, accepts, strict=True):
        assert 0 <= accepted <= drafted <= (size or speculation["draft_length"])
        assert accepted <= (length or drafted)
    own = len(accepts)  # each step adds one of the base's tokens, unless a drafted one ended the answer
    assert sum(accepts) <= new_tokens <= sum(accepts) + own


@pytest.mark.parametrize(
    "pruning", [{}, {"keep": 5, "final_wipe": 4}, {"keep": 5, "final_wipe": 4, "final_share": 0.4}]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_auto_never_changes_the_answer(pruning, attention, monkeypatch):
    drafts = set()
    for seed, drafting in enumerate((0.01, 0.3, 5.0)):
        model, inputs = grown(seed=seed, attention=attention), prompt(seed)
        made = step_costs(drafting, per_node=0.02, fill=0.01)
        monkeypatch.setattr(TwigVLM, "costs", lambda self, made=made: made)
        plain = model.generate(**inputs, **pruning, max_new_tokens=24)
        output = model.generate(**inputs, **pruning, max_new_tokens=24, speculate="auto", return_dict_in_generate=True)
        assert output.sequences.tolist() == plain.tolist()
        drafts |= set(output.drafted_lengths[0])
    assert 0 in drafts
    assert max(drafts) > 1


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_an_agreeing_twig_has_long_drafts_accepted(seed):
    model = grown()
    output = model.generate(
        **prompt(seed),
        max_new_tokens=24,
        speculate="chain",
        draft_threshold=0.0,
        return_dict_in_generate=True,
    )
    assert max(output.accepted_lengths[0]) >= 2
    assert len(output.accepted_lengths[0]) < 23  # fewer steps than tokens


@pytest.fixture
def perfect():
    """The layers that the twig skips do nothing, so that its first choice is the base's own; it is sure of it, too."""
    base = tiny_llava(layers=LAYERS, deep_scale=0.0, from_layer=4)
    base.lm_head.weight.data *= 10
    return TwigVLM.grow(base, TwigConfig(2, 2))


@pytest.mark.parametrize(
    ("speculation", "drafted", "steps"),
    [
        # The first draft, from the prompt's last token, is a chain.
        ({"speculate": "chain", "draft_length": 4, "draft_threshold": 0.0}, 4, [4, 4, 4, 4]),
        ({"speculate": "tree"}, 60, [4, 4, 4, 4]),
        ({"speculate": "tree", "tree_width": 1}, 4, [4, 4, 4, 4]),
    ],
)
def test_with_a_perfect_twig_every_step_adds_a_whole_draft(perfect, speculation, drafted, steps):
    new = sum(steps) + len(steps)
    output = perfect.generate(**prompt(), max_new_tokens=new, **speculation, return_dict_in_generate=True)
    assert output.sequences.tolist() == perfect.model.generate(**prompt(), max_new_tokens=new).tolist()
    assert output.accepted_lengths == [steps]
    assert output.drafted_lengths == [[4] + [drafted] * (len(steps) - 1)]


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
def test_no_more_is_drafted_than_was_asked_for(perfect, new):
    for speculation in ({"speculate": "chain", "draft_threshold": 0.0}, {"speculate": "tree", "tree_width": 1}):
        output = perfect.generate(**prompt(), max_new_tokens=new, **speculation, return_dict_in_generate=True)
        assert output.sequences.shape[1] == prompt()["input_ids"].shape[1] + new
        steps = len(output.drafted_lengths[0])  # the last token of each comes from the base
        assert sum(output.drafted_lengths[0]) == new - steps


def test_a_draft_ends_after_an_unlikely_token():
    model, inputs = grown(agreeing=False), prompt()
    options = {"speculate": "chain", "max_new_tokens": 12, "draft_length": 4, "return_dict_in_generate": True}
    surest = model.generate(**inputs, draft_threshold=1.0, **options)
    assert set(surest.drafted_lengths[0]) <= {0, 1}
    assert 4 in model.generate(**inputs, draft_threshold=0.0, **options).drafted_lengths[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pruning", [{}, {"keep": VISUAL}, {"retain": VISUAL, "final_wipe": LAYERS}])
@settings(max_examples=12)
@given(
    st.integers(0, 1000),
    st.sampled_from([{}, {"speculate": "chain", "draft_threshold": 0.1}, {"speculate": "tree"}]),
    st.booleans(),
)
def test_keeping_everything_is_plain_generate(attention, pruning, seed, speculation, agreeing):
    model = grown(attention=attention, agreeing=agreeing)
    inputs = prompt(seed)
    expected = model.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    got = model.generate(**inputs, **pruning, max_new_tokens=16, **speculation)
    assert got.tolist() == expected.tolist()


@torch.no_grad()
def _by_definition(model, inputs, kept, kept_late, final_wipe, new):
    """Pruned greedy decoding with no cache: each token from a full pass, layer by layer as the method is written."""
    base, trunk = model.base, model.twig.config.trunk_layers
    captured = base.prompt(**inputs)
    hidden, visual = captured.hidden, captured.visual_mask[0]
    tokens = []
    for _ in range(new):
        length = hidden.shape[1]
        visual_now = torch.cat((visual, torch.zeros(length - len(visual), dtype=torch.bool)))
        rope = base.rotary(hidden, torch.arange(length)[None])
        masks = base.masks()
        state = base.run_layers(hidden, 0, trunk, rope, masks)
        stays = ~visual_now
        stays[kept] = True
        middle = stays.nonzero()[:, 0]
        stays_late = ~visual_now
        stays_late[kept_late] = True
        late = stays_late.nonzero()[:, 0]

        def rope_at(indices, rope=rope):
            return select_tokens(rope, indices[None])

        state = base.run_layers(state[:, middle], trunk, final_wipe, rope_at(middle), masks)
        state = state[:, torch.isin(middle, late)]
        state = base.run_layers(state, final_wipe, LAYERS, rope_at(late), masks)
        tokens.append(int(base.logits(state[:, -1]).argmax()))
        hidden = torch.cat((hidden, base.embed(torch.tensor([tokens[-1:]]))), dim=1)
    return tokens


@settings(max_examples=30)
@given(cases())
def test_pruning_by_its_definition(case):
    shape, inputs, pruning, speculation, new = case
    model = grown(**shape)
    if not pruning:
        pruning = {"keep": 5, "final_wipe": LAYERS, "final_share": 0.0}
    memory = PrefixCache()
    model.generate(**inputs, **pruning, max_new_tokens=1, memory=memory)
    (scores,) = memory.scores.values()
    options = {"max_new_tokens": min(new, 8), "return_dict_in_generate": True}
    output = model.generate(**inputs, **pruning, **speculation, **options)
    kept = output.kept_indices[0]
    assert len(kept) == pruning["keep"]
    assert model.base.visual_mask(inputs["input_ids"])[0, kept].all()
    assert kept.tolist() == sorted(set(kept.tolist()))
    late = int(pruning["final_share"] * pruning["keep"] + 0.5) if pruning["final_wipe"] < LAYERS else len(kept)
    kept_late = kept[scores[0, kept].argsort(descending=True, stable=True)[:late]]
    expected = _by_definition(model, inputs, kept, kept_late, pruning["final_wipe"], options["max_new_tokens"])
    assert output.sequences[0, inputs["input_ids"].shape[1] :].tolist() == expected


def test_pruning_matters_in_these_models():
    """Guards the tests above: with few tokens the answer differs from the full one, and the choice of tokens matters."""
    model, answers = grown(agreeing=False), set()
    for scorer in (None, RandomScores(0), RandomScores(1), BaseLayerAttention(2)):
        answers.add(tuple(model.generate(**prompt(), keep=2, scorer=scorer, max_new_tokens=12)[0].tolist()))
    answers.add(tuple(model.generate(**prompt(), max_new_tokens=12)[0].tolist()))
    assert len(answers) >= 3


@settings(max_examples=15)
@given(st.integers(0, 1000))
def test_disabled_is_the_base_bit_for_bit(seed):
    inputs, options = prompt(seed), {"max_new_tokens": 10, "output_logits": True, "return_dict_in_generate": True}
    untouched = tiny_llava(1)
    expected = untouched.generate(**inputs, **options)
    model = grown(seed=1, agreeing=False)
    for _ in range(2):  # before use and after
        with model.disabled():
            got = model.generate(**inputs, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
        model.generate(**inputs, max_new_tokens=10, keep=3, speculate="chain", draft_threshold=0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), untouched.parameters(), strict=True))
