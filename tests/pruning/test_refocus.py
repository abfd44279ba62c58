"""Refocusing: kept visual tokens are chosen again by the rule, and the answer is that of a pass that sees them."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import families
from tests.pruning.references import logits_by_looking
from tests.pruning.trunks import WAYS, after_trunk
from tests.tiny import VISUAL, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.base.token_inputs import TokenInputs, select_rows, select_tokens
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.methods.pruning_head import VisualQuery, log_visual_attention
from twigvlm.pruning.methods.random import RandomScores
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.methods.twig_attention import TwigAttention
from twigvlm.pruning.refocus import HeldTokens, Refocus, RefocusState, exchanged

LAYERS, TRUNK, TOKENS = 6, 2, 12


@cache
def grown(pruning_head=True, attention="eager"):
    torch.manual_seed(0)
    base = tiny_llava(attention=attention, deep_scale=0.3, from_layer=4)
    return TwigVLM.grow(base, TwigConfig(TRUNK, 2, pruning_head=pruning_head))


def answered(model, inputs, **options):
    options = {"keep": 5, "final_wipe": 5, "refocus": 0.9, "max_new_tokens": TOKENS, **options}
    return model.generate(**inputs, **options, return_dict_in_generate=True)


def tokens_of(output, inputs):
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist()


class Scores:
    """A logits processor that keeps what the base chose by; no placeholder is chosen, which a reference could not embed."""

    def __init__(self):
        self.rows = []

    def __call__(self, ids, scores):
        self.rows.append(scores[0].clone())
        scores[:, 99] = float("-inf")
        return scores


@torch.no_grad()
def shares(model, inputs, tokens):
    """The twig's scores of the visual tokens at each of the tokens, by one pass over all of them without a cache."""
    base, twig = model.base, model.twig
    ids = torch.cat((inputs["input_ids"], torch.tensor([tokens])), dim=1)
    captured = base.prompt(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
    per_token, masks = base.token_inputs(captured), base.masks()
    hidden = base.run_layers(captured.hidden, 0, TRUNK, per_token, masks)
    asking = torch.zeros_like(captured.visual_mask)
    asking[:, inputs["input_ids"].shape[1] :] = True
    query = VisualQuery.at(asking, captured.visual_mask)
    hidden = twig.last_input(hidden, per_token, masks)
    return log_visual_attention(twig.layers[-1], hidden, per_token, query, twig.pruning_head)[0].exp(), query.visual[0]


@pytest.mark.parametrize("pruning_head", [True, False])
@pytest.mark.parametrize("way", WAYS)
@given(seed=st.integers(0, 50), keep=st.integers(1, VISUAL - 1), threshold=st.floats(0.2, 1.0))
@settings(max_examples=5)
def test_tokens_are_chosen_again_by_the_rule(way, pruning_head, seed, keep, threshold):
    """Where the kept ones have less than τ of the best share, and nowhere else; then the best of the others replace the worst."""
    model, inputs = grown(pruning_head), prompt(seed)
    output = answered(model, inputs, keep=keep, refocus=threshold, logits_processor=[Scores()], **WAYS[way])
    scores, visual = shares(model, inputs, tokens_of(output, inputs)[:-1])
    kept, looks = output.kept_indices[0], {look.after: look for look in output.looks[0]}
    for after, row in enumerate(scores, start=1):
        best = row.topk(keep)
        share = float(row[torch.isin(visual, kept)].sum() / best.values.sum())
        if abs(share - threshold) < 1e-4 or (1 - share < 1e-5 and after not in looks):
            kept = looks[after].kept if after in looks else kept
            continue  # rounding decides
        assert (after in looks) == (share < threshold)
        if after in looks:
            share_of = dict(zip(visual.tolist(), row.tolist(), strict=True))
            chosen, wanted = set(kept.tolist()), (3 + threshold) / 4 * float(best.values.sum())
            while sum(share_of[token] for token in chosen) < wanted - 1e-6:
                out = min(chosen, key=share_of.get)
                chosen = chosen - {out} | {max(share_of.keys() - chosen, key=share_of.get)}
            assert looks[after].ran == len(chosen - {*kept.tolist()})
            assert {*looks[after].kept.tolist()} == chosen
            kept = looks[after].kept


@given(st.integers(0, 10**6), st.integers(2, 60))
def test_the_best_tokens_ask_for_no_others_however_sums_are_rounded(seed, count):
    """Or else τ = 1 would reject every draft."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 3, count, generator=generator).softmax(dim=-1)
    scores[:] = scores[:, :1]  # three tokens that look at the same
    keep = int(torch.randint(1, count + 1, (), generator=generator))
    slots = torch.full((count,), -1).scatter(0, scores[0, 0].topk(keep).indices, torch.arange(keep))
    states, keys = torch.zeros(1, count, 4), torch.zeros(1, count, 4)
    pruned = HeldTokens((2, 5), torch.arange(keep), slots)
    row = RefocusState(1.0, states, TokenInputs(states, states), keys, torch.arange(count), pruned)
    assert not Refocus(grown().twig, [row]).asks(scores).any()


@torch.no_grad()
@pytest.mark.parametrize("twig_layers", [1, 2], ids=["has-a-window", "sees-all"])
def test_without_a_p_head_scores_are_the_last_twig_layer_s_own_attention_to_visual_tokens(twig_layers):
    """Each new token sees as many of them as its window leaves it."""
    model = TwigVLM.grow(families.tiny("gemma3", "eager"), TwigConfig(TRUNK, twig_layers))
    trunk, maps = after_trunk(model, families.prompt(model.model, "gemma3", "images")), []
    inputs, visual = trunk.tokens.inputs, trunk.tokens.visual[0]
    hook = model.twig.layers[-1].self_attn.register_forward_hook(lambda *call: maps.append(call[2][1]))
    model.twig(trunk.tokens.hidden, inputs, trunk.masks)
    hook.remove()
    new = torch.arange(int(visual.nonzero()[-1]) + 1, len(visual))
    row = RefocusState.of(trunk, 0, visual, 0.9, 5)
    scores = Refocus(model.twig, [row]).scores(trunk.fill_twig()[:, new], select_tokens(inputs, new[None]))[0]
    seen = maps[0][0][:, new][:, :, visual]
    torch.testing.assert_close(scores, (seen / seen.sum(-1, keepdim=True)).mean(0))
    counts = (scores > 0).sum(-1)
    assert counts.tolist() == ([8, 7, 6, 5] if twig_layers == 1 else [32] * 4)


@torch.no_grad()
def test_rows_that_do_not_look_again_hold_no_keys_and_change_no_scores():
    model, options = grown(), {"max_new_tokens": 8}
    engine = model.engine()
    for seed in range(6):
        engine.add(prompt(seed), **options, **({"keep": 5, "refocus": 0.9} if seed in (1, 4) else {}))
    engine.step()
    batch = engine.runner.batch
    hidden = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0))
    inputs = batch.inputs(torch.arange(3).expand(6, 3), 100)
    scores = batch.refocus.scores(hidden, inputs)
    assert not scores[[0, 2, 3, 5]].any()
    for row in (1, 4):
        alone = Refocus(model.twig, [engine.active[row].refocus_state])
        own = select_rows(inputs, torch.tensor([row]))
        torch.testing.assert_close(scores[row], alone.scores(hidden[[row]], own)[0])
    looking = [state for state in batch.refocus.rows if state is not None]
    held = batch.refocus.keys.nbytes + sum(state.keys.nbytes + state.states.nbytes for state in looking)
    assert held <= sum(row.refocus_bytes for row in engine.active)


shares_of_tokens = st.lists(st.integers(0, 50), min_size=2, max_size=12)


@given(shares_of_tokens, st.data())
def test_exchanges_are_the_fewest_that_suffice(values, data):
    scores = torch.tensor(values).float()
    held = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    share = data.draw(st.sampled_from([0.1, 0.5, 0.75, 0.9, 1.0]))
    count = int(held.sum())
    if not count:
        return
    after = exchanged(scores, held, share)
    assert int(after.sum()) == count
    new, gone = after & ~held, held & ~after
    best = scores.topk(count).values.sum()
    enough = scores[after].sum() >= share * best
    others = scores[~after].max() if (~after).any() else torch.tensor(-1.0)
    assert enough or others <= scores[after].min()
    if new.any():
        assert scores[new].min() > scores[gone].max()
        assert scores[new].min() >= (scores[~held & ~new].max() if (~held & ~new).any() else -1)
        fewer = after.clone()  # without the last exchange
        fewer[new.nonzero()[scores[new].argmin(), 0]] = False
        fewer[gone.nonzero()[scores[gone].argmax(), 0]] = True
        assert scores[fewer].sum() < share * best or int(new.sum()) == 1


@pytest.mark.parametrize("final_wipe", [5, LAYERS])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_sees_what_is_held(way, attention, final_wipe):
    """Positions, masks, slots of the cache and stored states, against one pass without a cache."""
    looked = 0
    for seed in range(4):
        inputs, recorded = prompt(seed, before=seed, after=3 + seed), Scores()
        options = {"final_wipe": final_wipe, "logits_processor": [recorded], **WAYS[way]}
        output = answered(grown(attention=attention), inputs, **options)
        tokens = tokens_of(output, inputs)
        expected = logits_by_looking(grown(), inputs, output.kept_indices[0], output.looks[0], final_wipe, tokens[:-1])
        torch.testing.assert_close(torch.stack(recorded.rows), expected, rtol=1e-3, atol=1e-3)
        fixed = logits_by_looking(grown(), inputs, output.kept_indices[0], [], final_wipe, tokens[:-1])
        looked += int((expected - fixed).abs().max() > 0.02)
    assert looked == 4


@pytest.mark.parametrize("way", WAYS)
def test_late_layers_take_up_the_best_that_are_chosen_again(way):
    """After each look they hold the best, by the newest token's scores, of what they held and of what was chosen again."""
    changed = 0
    for seed in range(4):
        inputs, recorded, memory = prompt(seed, before=seed, after=3 + seed), Scores(), PrefixCache()
        answered(grown(), inputs, refocus=None, max_new_tokens=1, memory=memory)
        (first,) = memory.scores.values()
        options = {"final_wipe": 4, "final_share": 0.6, "logits_processor": [recorded], **WAYS[way]}
        output = answered(grown(), inputs, **options)
        tokens, kept = tokens_of(output, inputs), output.kept_indices[0]
        scores, visual = shares(grown(), inputs, tokens[:-1])
        late = [{*kept[first[0, kept].topk(3).indices].tolist()}]
        held = {*kept.tolist()}
        for look in output.looks[0]:
            share_of = dict(zip(visual.tolist(), scores[look.after - 1].tolist(), strict=True))
            candidates = late[-1] | {*look.kept.tolist()} - held
            late.append({*sorted(candidates, key=share_of.get)[-3:]})
            held = {*look.kept.tolist()}
        expected = logits_by_looking(grown(), inputs, kept, output.looks[0], 4, tokens[:-1], late)
        torch.testing.assert_close(torch.stack(recorded.rows), expected, rtol=1e-3, atol=1e-3)
        changed += any(one != late[0] for one in late)
    assert changed == 4


@pytest.mark.parametrize("way", WAYS)
def test_sampled_answers_do_not_depend_on_drafts(way):
    for seed in range(2):
        drawn = [
            answered(
                grown(),
                prompt(seed),
                do_sample=True,
                temperature=1.5,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )
            for options in ({}, WAYS[way])
        ]
        assert torch.equal(drawn[0].sequences, drawn[1].sequences)
        assert [look.after for look in drawn[0].looks[0]] == [look.after for look in drawn[1].looks[0]]


def test_positions_count_the_padding():
    model, inputs = grown(), prompt(1)
    alone = answered(model, inputs)
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (3, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    output = answered(model, padded)
    assert alone.looks[0]
    for look, other in zip(alone.looks[0], output.looks[0], strict=True):
        assert torch.equal(look.kept + 3, other.kept)


def test_nothing_is_chosen_again_where_everything_is_kept():
    model, inputs = grown(), prompt(0)
    output = answered(model, inputs, keep=VISUAL, final_wipe=LAYERS, refocus=1.0)
    assert output.looks == [[]]
    assert torch.equal(output.sequences, model.generate(**inputs, max_new_tokens=TOKENS))


def test_without_refocus_there_are_no_looks():
    assert answered(grown(), prompt(0), refocus=None).looks is None


def test_what_refocus_needs():
    model, inputs = grown(), prompt(0)
    pruner = TwigPruner(RandomScores(), TRUNK, 5)
    for options, message in (
        ({"refocus": 0.9}, "refocus=0.9: needs a budget"),
        ({"refocus": 1.5, "keep": 5}, "refocus=1.5: must be more than 0, and at most 1"),
        ({"refocus": 0.0, "keep": 5}, "refocus=0: must be more than 0"),
        ({"refocus": 0.9, "keep": 5, "scorer": RandomScores()}, "ranks only at the end of the prompt"),
        ({"refocus": 0.9, "keep": 5, "scorer": TwigAttention()}, "ranks only at the end of the prompt"),
        ({"refocus": 0.9, "keep": 5, "retain_per_image": True}, "give only one of them"),
        ({"refocus": 0.9, "retain": 8, "pruner": pruner}, "belongs to the twig's own pruning"),
    ):
        with pytest.raises(TwigVLMError, match=message):
            model.generate(**inputs, **options, max_new_tokens=2)
