"""Scout mode: one ranking before the decoder, and every layer holds the kept tokens alone."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import families
from tests.batches import batched
from tests.families import LAYERS, TRUNK, TWIG
from tests.pruning.trunks import PROMPTS, WAYS
from tests.tiny import VISUAL, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.evaluation.variants import answer_all, make_variants
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.budget import average_scouted, solve_scouted


@cache
def grown(trunk=TRUNK):
    model = tiny_llava(deep_scale=0.1, from_layer=trunk + TWIG)
    return TwigVLM.grow(model, TwigConfig(trunk, TWIG, pruning_head=True, final_wipe=5))


def answer(model, inputs, **options):
    output = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, **options)
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), output


@torch.no_grad()
def answered_without(model, inputs, kept, count=8):
    """What the base alone answers to the prompt without the tokens that are not kept, at the positions that they had."""
    given = model.base.prompt(**inputs)
    stays = ~given.visual_mask[0]
    stays[kept] = True
    hidden, positions = given.hidden[:, stays], given.position_ids[..., stays]
    tokens, last = [], int(given.position_ids.max())
    for _ in range(count):
        states = model.base.decoder(inputs_embeds=hidden, position_ids=positions).last_hidden_state
        tokens.append(int(model.base.head(states[0, -1]).argmax()))
        hidden = torch.cat((hidden, model.base.embed(torch.tensor([[tokens[-1]]]))), dim=1)
        positions = torch.cat((positions, torch.full_like(positions[..., :1], last + len(tokens))), dim=-1)
    return tokens


@pytest.mark.parametrize("way", WAYS)
def test_the_answer_is_the_base_s_to_a_prompt_without_the_dropped_tokens(way):
    """However it is drafted, alone and in a batch, which keeps what the ranking after layer K keeps."""
    model, options = grown(), {"keep": 6, "scout": True, **WAYS[way]}
    alone = []
    for inputs in PROMPTS:
        tokens, output = answer(model, inputs, **options)
        (kept,) = output.kept_indices
        assert len(kept) == 6
        assert torch.equal(kept, answer(model, inputs, keep=6)[1].kept_indices[0])
        assert tokens[0] == answered_without(model, inputs, kept)
        assert output.average_visual == [pytest.approx(6 + VISUAL * TRUNK / LAYERS)]
        alone += tokens
    together, output = answer(model, batched(PROMPTS), **options)
    assert together == alone


@pytest.mark.parametrize("name", families.TINY)
def test_keeping_everything_is_the_base_in_every_family(name):
    hf_model = families.tiny(name)
    model, inputs = TwigVLM.grow(hf_model, TwigConfig(TRUNK, TWIG)), families.prompt(hf_model, name, "images")
    visual = int(model.base.visual_mask(inputs["input_ids"]).sum())
    tokens, _ = answer(model, inputs, keep=visual, scout=True, **WAYS["chain"])
    with model.disabled():
        expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokens == expected[:, inputs["input_ids"].shape[1] :].tolist()


def test_a_twig_on_the_first_layer_scouts_for_nothing():
    model = grown(trunk=0)
    _, output = answer(model, PROMPTS[0], retain=6, scout=True)
    assert len(output.kept_indices[0]) == 6
    assert output.average_visual == [6]


@given(st.integers(1, 700), st.integers(1, 60), st.data())
def test_the_budget_counts_the_scouting_pass(visual, layers, data):
    trunk, keep = data.draw(st.integers(0, layers)), data.draw(st.integers(1, visual))
    average = average_scouted(keep, visual, layers, trunk)
    assert average == pytest.approx((visual * trunk + keep * layers) / layers)
    assert solve_scouted(average, visual, layers, trunk) == keep


def test_sapling_s_numbers():
    assert solve_scouted(64, 576, 30, 1) == 45
    assert average_scouted(45, 576, 30, 1) == pytest.approx(64.2)


@pytest.mark.parametrize("retain", [5.4, 21.9, float("nan")])
def test_a_budget_that_scouting_alone_exceeds_names_the_range(retain):
    with pytest.raises(TwigVLMError, match=r"must be 6\.3 to 21\.3 for 16 visual tokens and scouting by 2 of 6 layers"):
        grown().generate(**PROMPTS[0], retain=retain, scout=True, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs a budget"),
        ({"keep": 17}, "keep=17"),
        ({"keep": 4, "final_wipe": 5}, "scout and final_wipe"),
        ({"keep": 4, "refocus": 0.5}, "scout and refocus"),
    ],
)
def test_what_does_not_go_with_scouting_is_an_error(options, words):
    with pytest.raises(TwigVLMError, match=words):
        grown().generate(**PROMPTS[0], scout=True, max_new_tokens=1, **options)


def test_text_alone_is_answered_as_ever():
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    tokens, output = answer(grown(), inputs, retain=10, scout=True)
    assert output.average_visual == [0]
    assert tokens == answer(grown(), inputs)[0]


def test_evaluation_compares_it_under_the_same_budget():
    model = grown()
    variants = make_variants(model, ["twig", "scout"], [10], [4, 5])
    assert [variant.name for variant in variants] == ["none", "twig@10/4", "twig@10/5", "scout@10"]
    outcome = answer_all(model, PROMPTS[0], variants, 8)["scout@10"]
    tokens, output = answer(model, PROMPTS[0], retain=10, scout=True)
    assert [outcome.ids] == tokens
    assert outcome.kept == len(output.kept_indices[0]) == 5


def test_a_conversation_asks_again_with_another_ranking():
    model, memory, kept = grown(), PrefixCache(), []
    longer = torch.cat((PROMPTS[0]["input_ids"], torch.tensor([[11, 23, 5, 31, 47]])), dim=1)
    options = {"keep": 6, "scout": True, "max_new_tokens": 8, "return_dict_in_generate": True}
    for ids in (PROMPTS[0]["input_ids"], longer):
        inputs = {**PROMPTS[0], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got, alone = model.generate(**inputs, **options, memory=memory), model.generate(**inputs, **options)
        assert torch.equal(got.sequences, alone.sequences)
        assert torch.equal(got.kept_indices[0], alone.kept_indices[0])
        kept.append(got.kept_indices[0].tolist())
    assert kept[0] != kept[1]
