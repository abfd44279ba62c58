"""Every family: no pruning changes nothing, speculation changes nothing, and pruning hides tokens and nothing else."""

import pytest
import torch

from tests.batches import batched
from tests.families import IMAGE, LAYERS, TINY, TRUNK, VIDEO, prompts, tiny
from tests.grown_families import CHAIN, answer, grown, inputs_of, visual_tokens
from tests.pruning.references import logits_by_hiding
from tests.twigs import step_costs
from twigvlm import TwigVLM
from twigvlm.base.families import FAMILIES, LANGUAGE_MODELS
from twigvlm.base.layers import window_of
from twigvlm.errors import TwigVLMError
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.cut import Cut
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.random import RandomScores

CASES = [(name, kind) for name in TINY for kind in prompts(name)]
TREE = {"speculate": "tree", "tree_depth": 3, "tree_width": 4, "tree_expand": 3, "tree_nodes": 12}


class Scores:
    """A logits processor that keeps the scores that the base chose by, and may forbid some tokens."""

    def __init__(self, *forbidden):
        self.rows, self.forbidden = [], forbidden

    def __call__(self, ids, scores):
        self.rows.append(scores[0].clone())
        scores[:, self.forbidden] = float("-inf")
        return scores


def test_every_entry_has_a_tiny_model():
    models = [grown(name).base for name in TINY]
    assert {family.model_type for family in FAMILIES} == {base.family.model_type for base in models}
    known = {one.model_type for one in LANGUAGE_MODELS}
    assert known == {base.language_model.model_type for base in models}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_keeping_everything_is_plain_generate(name, kind, attention):
    model, inputs = grown(name, attention), inputs_of(name, kind)
    budget = {"keep": visual_tokens(name, kind) or 5, "final_wipe": LAYERS}
    recorded = Scores()
    got = model.generate(**inputs, **budget, **CHAIN, max_new_tokens=10, logits_processor=[recorded])
    with model.disabled():
        expected = model.generate(
            **inputs, max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert answer(got, inputs) == answer(expected, inputs)
    for ours, theirs in zip(recorded.rows, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [1, 5])
@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "text"])
def test_pruning_hides_tokens_and_nothing_else(name, kind, keep):
    """The strongest check of positions, masks, caches and features for later layers, prefill and decoding alike."""
    # an answer of placeholders would be a prompt of placeholders to the reference
    model, inputs, recorded = grown(name), inputs_of(name, kind), Scores(IMAGE, VIDEO)
    keep = min(keep, visual_tokens(name, kind) - 1)
    options = {"keep": keep, "final_wipe": 5, "final_share": 0.4, "scorer": RandomScores(keep)}
    memory = PrefixCache()
    model.generate(**inputs, **options, max_new_tokens=1, memory=memory)
    output = model.generate(
        **inputs, **options, max_new_tokens=8, logits_processor=[recorded], return_dict_in_generate=True
    )
    tokens, kept = answer(output, inputs), output.kept_indices[0]
    scores, late = memory.scores[options["scorer"]][0], int(0.4 * keep + 0.5)
    cuts, left = (Cut(TRUNK, keep), Cut(5, late)), (kept, kept[scores[kept].topk(late).indices].sort().values)
    expected = logits_by_hiding(grown(name, "eager"), inputs, cuts, left, tokens[:-1])
    torch.testing.assert_close(torch.stack(recorded.rows), expected, rtol=1e-3, atol=1e-3)
    everything = logits_by_hiding(grown(name, "eager"), inputs, (), (), tokens[:-1])
    assert (expected - everything).abs().max() > 0.02  # hiding them matters in this model


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "text"])
def test_tokens_that_are_chosen_again_are_seen(name, kind):
    """Positions, masks and features of later layers of what refocusing takes up, against the base's own forward."""
    # a P-Head looks at all visual tokens, where a window may hide them from the attention of late tokens
    model, inputs, recorded = grown(name, pruning_head=True), inputs_of(name, kind), Scores(IMAGE, VIDEO)
    keep = visual_tokens(name, kind) // 4
    options = {"keep": keep, "final_wipe": 5, "refocus": 0.97, "logits_processor": [recorded]}
    output = model.generate(**inputs, **options, max_new_tokens=12, return_dict_in_generate=True)
    tokens, looks, kept = answer(output, inputs), [], output.kept_indices[0]
    gone = kept[:0]
    for look in output.looks[0]:
        if torch.isin(look.kept, gone).any():  # the reference holds each token once
            tokens = tokens[: look.after]
            break
        looks.append(look)
        before = looks[-2].kept if len(looks) > 1 else kept
        gone = torch.cat((gone, before[~torch.isin(before, look.kept)]))
    assert looks
    cuts, left = (Cut(TRUNK, keep), Cut(5, 0)), (kept, kept[:0])
    reference = grown(name, "eager")
    expected = logits_by_hiding(reference, inputs, cuts, left, tokens[:-1], looks)
    torch.testing.assert_close(torch.stack(recorded.rows[: len(tokens)]), expected, rtol=1e-3, atol=1e-3)
    fixed = logits_by_hiding(reference, inputs, cuts, left, tokens[:-1])
    assert (expected - fixed).abs().max() > 0.005  # it matters in this model


@pytest.mark.parametrize("pruning_head", [False, True])
def test_what_a_window_hides_is_not_chosen_again(pruning_head):
    """The last twig layer's attention ranks what it sees; a P-Head looks at all visual tokens."""
    model, inputs = grown("llava_next", pruning_head=pruning_head), inputs_of("llava_next", "images")
    options = {"keep": 4, "final_wipe": 5, "refocus": 1.0, "max_new_tokens": 12, "return_dict_in_generate": True}
    output = model.generate(**inputs, **options)
    length, window = inputs["input_ids"].shape[1], window_of(model.twig.layers[-1])
    kept, hidden = output.kept_indices[0], 0
    for look in output.looks[0]:
        new = look.kept[~torch.isin(look.kept, kept)]
        hidden += int((new <= length + look.after - 1 - window).sum())
        kept = look.kept
    assert output.looks[0]
    assert (hidden > 0) == pruning_head


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_speculation_changes_nothing(name, kind, monkeypatch):
    model, inputs = grown(name), inputs_of(name, kind)
    monkeypatch.setattr(TwigVLM, "costs", lambda self: step_costs(draft=0.1))
    pruning = {"keep": max(1, visual_tokens(name, kind) // 3), "final_wipe": 5, "max_new_tokens": 12}
    for refocus in (None, 0.9):
        plain = model.generate(**inputs, **pruning, refocus=refocus)
        for way, longest in ((CHAIN, 4), (TREE, 12), ({"speculate": "auto"}, 1)):
            output = model.generate(**inputs, **pruning, **way, refocus=refocus, return_dict_in_generate=True)
            assert output.sequences.tolist() == plain.tolist()
            assert max(output.drafted_lengths[0]) >= longest


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TINY)
def test_scores_are_the_base_s_own_attention(name, attention):
    inputs, maps = (
        inputs_of(name, "images"),
        grown(name, "eager").model(**inputs_of(name, "images"), output_attentions=True),
    )
    for layer in range(1, LAYERS + 1):
        model, seen = grown(name, attention), []

        def scorer(trunk, layer=layer, seen=seen):
            seen.append(BaseLayerAttention(layer)(trunk))
            return seen[0]

        model.generate(**inputs, keep=1, scorer=scorer, max_new_tokens=1)
        expected = maps.attentions[layer - 1][0, :, -1].mean(dim=0)
        visual = model.base.visual_mask(inputs["input_ids"])[0]
        torch.testing.assert_close(seen[0][0], torch.where(visual, expected, 0.0), rtol=1e-3, atol=1e-5)


def preceded(inputs, count):
    """A prompt with more text before it."""
    per_token = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    filling = {"input_ids": 7, "attention_mask": 1}
    pad = torch.nn.functional.pad
    return {
        name: pad(value, (count, 0), value=filling.get(name, 0)) if name in per_token else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("name", TINY)
def test_a_budget_is_split_among_images(name):
    model, inputs = grown(name), inputs_of(name, "images")
    ids = inputs["input_ids"][0]
    output = model.generate(**inputs, keep=4, retain_per_image=True, max_new_tokens=1, return_dict_in_generate=True)
    text = (~model.base.visual_mask(ids[None])[0]).cumsum(0)
    assert sorted(text[output.kept_indices[0]].unique(return_counts=True)[1].tolist()) in (
        [2, 2],
        [1, 1, 1, 1],
        [1, 1, 2],
    )


POOLED = {("llava_next_video", "video"), ("llava_onevision", "video")}
"""Videos whose patches are pooled, of families that pool no images."""


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "text"])
def test_vision_towers_rank_what_is_not_pooled(name, kind):
    """Images and videos alike, and nothing is dropped for not being known."""
    model, inputs = grown(name), inputs_of(name, kind)
    options = {"pruner": "fastervlm", "retain": 0.6 * visual_tokens(name, kind), "max_new_tokens": 2}
    if model.base.family.tower.pools or (name, kind) in POOLED:
        with pytest.raises(TwigVLMError, match=r"pools patches|changes them after its projector"):
            model.generate(**inputs, **options)
        return
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    kept = inputs["input_ids"][0, output.kept_indices[0]]
    for placeholder in {*kept.tolist(), IMAGE, *([VIDEO] if kind == "video" else [])}:
        share = int((kept == placeholder).sum()) / int((inputs["input_ids"] == placeholder).sum())
        assert 0.4 < share < 0.8


class ScoresById(dict):
    """A logits processor that keeps the scores by the ids, without padding, that they follow."""

    def __call__(self, ids, scores):
        for row, of_row in zip(ids, scores, strict=True):
            first = int(row.nonzero()[0])  # the padding token is 0
            self[tuple(row[first:].tolist())] = of_row.clone()
        return scores


# Eager attention only adds other masks: full ones, windows with M-RoPE, and images that see themselves both ways.
@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "sdpa") for name in TINY), *((name, "eager") for name in ("llava", "qwen2_vl", "gemma3"))],
)
def test_rows_of_a_batch_are_as_if_alone(name, attention):
    model = grown(name, attention)
    rows = [inputs_of(name, "images"), preceded(inputs_of(name, "images", 1), 5)]
    batch = batched(rows)
    for pruning in ({}, {"keep": 4, "final_wipe": 5, "refocus": 0.9}):
        options, alone = {**pruning, "max_new_tokens": 8}, ScoresById()
        answers = [model.generate(**row, **options, logits_processor=[alone]) for row in rows]
        expected = [ids[0, row["input_ids"].shape[1] :].tolist() for ids, row in zip(answers, rows, strict=True)]
        for speculation in ({}, CHAIN, TREE):
            together = ScoresById()
            got = model.generate(**batch, **options, **speculation, logits_processor=[together])
            assert got[:, batch["input_ids"].shape[1] :].tolist() == expected
            assert together.keys() == alone.keys()
            for ids, scores in alone.items():
                torch.testing.assert_close(together[ids], scores, rtol=1e-3, atol=1e-3)


def followed(inputs, tokens):
    """A prompt with more text behind it."""
    more = torch.tensor([tokens])
    filling = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    per_token = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {
        name: torch.cat((value, filling.get(name, torch.zeros_like(more))), dim=1) if name in per_token else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "text"])
def test_a_conversation_goes_on_as_one_prompt(name, kind):
    """Trunk and twig keep what they know, with M-RoPE, windows, features for later layers and images seen both ways."""
    model, inputs = grown(name), inputs_of(name, kind)
    options = {"keep": 4, "final_wipe": 5, "max_new_tokens": 6, **CHAIN}
    memory, alone, going_on = PrefixCache(), ScoresById(), ScoresById()
    first = model.generate(**inputs, **options, memory=memory)
    longer = followed(inputs, [*answer(first, inputs), 5, 6, 7])
    expected = model.generate(**longer, **options, logits_processor=[alone])
    got = model.generate(**longer, **options, memory=memory, logits_processor=[going_on])
    assert got.tolist() == expected.tolist()
    for ids, scores in alone.items():
        torch.testing.assert_close(going_on[ids], scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_eager_and_sdpa_agree(name):
    inputs, answers = inputs_of(name, "images"), []
    for attention in ("eager", "sdpa"):
        output = grown(name, attention).generate(
            **inputs, **CHAIN, keep=4, final_wipe=5, max_new_tokens=8, return_dict_in_generate=True
        )
        answers.append((output.sequences.tolist(), output.kept_indices[0].tolist(), output.accepted_lengths))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", TINY)
def test_disabled_is_the_base(name):
    model, inputs = grown(name), inputs_of(name, "images")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = tiny(name).generate(**inputs, **options)
    model.generate(**inputs, keep=3, max_new_tokens=4)
    with model.disabled():
        got = model.generate(**inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
