"""A row of a batch gets the answer that it would get alone, whatever the others do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import batched
from tests.tiny import IMAGE_TOKEN, prompt
from tests.twigs import LAYERS, grown
from twigvlm import TwigConfig, TwigVLM
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.twig_attention import TwigAttention
from twigvlm.speculation.costs import StepCosts

CHAIN = {"speculate": "chain", "draft_threshold": 0.1}
TREE = {"speculate": "tree", "tree_nodes": 20, "tree_expand": 3}


def without_image(seed):
    one = prompt(seed)
    ids = one["input_ids"][one["input_ids"] != IMAGE_TOKEN][None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


rows = st.one_of(
    st.tuples(st.integers(0, 50), st.integers(0, 5), st.integers(1, 7)),  # seed, tokens before the image and after it
    st.tuples(st.integers(0, 9)),  # seed of a prompt of text alone
)


def built(row):
    return prompt(*row) if len(row) == 3 else without_image(*row)


def answers(output, width):
    """New tokens of each row, without what pads them."""
    return [row[width:].tolist() for row in output.sequences]


@settings(max_examples=18)
@given(
    rows=st.lists(rows, min_size=1, max_size=5),
    shape=st.fixed_dictionaries(
        {"seed": st.integers(0, 2), "agreeing": st.booleans(), "attention": st.sampled_from(["eager", "sdpa"])}
    ),
    pruning=st.sampled_from(
        [
            {},
            {"keep": 5},
            {"keep": 3, "final_wipe": 4},
            {"keep": 6, "final_wipe": 4, "final_share": 0.5},
            {"retain": 9.0, "final_wipe": 5, "scorer": TwigAttention("text")},
            {"keep": 4, "scorer": BaseLayerAttention(2)},
        ]
    ),
    speculation=st.sampled_from([{}, CHAIN, TREE, {**TREE, "tree_width": 1}, {"speculate": "lookup"}]),
    ends=st.lists(st.integers(0, 99), max_size=12, unique=True),
    new=st.integers(1, 18),
)
def test_rows_are_as_if_alone(rows, shape, pruning, speculation, ends, new):
    model, prompts = grown(**shape), [built(row) for row in rows]
    options = {**pruning, **speculation, "max_new_tokens": new, "return_dict_in_generate": True}
    options |= {"eos_token_id": ends or None, "pad_token_id": 0}
    batch = batched(prompts)
    output = model.generate(**batch, **options)
    width = batch["input_ids"].shape[1]
    longest = output.sequences.shape[1] - width
    for row, (one, got) in enumerate(zip(prompts, answers(output, width), strict=True)):
        alone = model.generate(**one, **options)
        length = one["input_ids"].shape[1]
        (expected,) = answers(alone, length)
        assert got == expected + [0] * (longest - len(expected))
        assert output.accepted_lengths[row] == alone.accepted_lengths[0]
        assert output.drafted_lengths[row] == alone.drafted_lengths[0]
        if alone.kept_indices is not None:
            assert (output.kept_indices[row] - (width - length)).tolist() == alone.kept_indices[0].tolist()


def test_plain_batches_are_the_bases():
    model = grown(agreeing=False)
    batch = batched([prompt(1, 2, 5), prompt(2, 4, 4), prompt(3, 0, 7)])
    expected = model.model.generate(**batch, max_new_tokens=12, do_sample=False)
    for speculation in ({}, CHAIN, TREE):
        assert model.generate(**batch, max_new_tokens=12, **speculation).tolist() == expected.tolist()


def test_rows_stop_costing_when_they_are_finished():
    model, batch = grown(), batched([prompt(1), prompt(2), prompt(3)])
    alone = model.generate(**prompt(1), max_new_tokens=9)[0, prompt(1)["input_ids"].shape[1] :].tolist()
    sizes = []
    hook = model.model.lm_head.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        output = model.generate(**batch, max_new_tokens=9, eos_token_id=alone[3], pad_token_id=0)
    finally:
        hook.remove()
    lengths = [int((row[batch["input_ids"].shape[1] :] != 0).sum()) for row in output]
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert min(lengths) < max(lengths)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_auto_changes_no_row(attention):
    model = grown(attention=attention)
    costs = StepCosts((0.0, *[0.1] * 64), (0.0, *[1.0] * 64), (0.0, *[5.0 + n for n in range(64)]), 0.01)
    model.costs = lambda: costs
    prompts = [prompt(1, 2, 5), prompt(2, 4, 4), without_image(3)]
    plain = model.generate(**batched(prompts), max_new_tokens=14, keep=4)
    output = model.generate(
        **batched(prompts), max_new_tokens=14, keep=4, speculate="auto", return_dict_in_generate=True
    )
    assert output.sequences.tolist() == plain.tolist()
    assert any(map(sum, output.accepted_lengths))
    del model.costs


@pytest.mark.parametrize("speculation", [{}, CHAIN, TREE], ids=["none", "chain", "tree"])
def test_what_asks_for_the_row_is_told(speculation):
    model, batch = grown(agreeing=False), batched([prompt(1), prompt(2)])

    def allowed(row, ids):
        return [10 * row + 2, 10 * row + int(ids[-1]) % 8 + 1]

    options = {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": 8}
    expected = model.model.generate(**batch, **options)
    assert model.generate(**batch, **options, **speculation).tolist() == expected.tolist()
    assert len({tuple(row[-8:].tolist()) for row in expected}) == 2


def test_flash_attention_takes_one_prompt(monkeypatch):
    model = TwigVLM.grow(grown().model, TwigConfig(2, 2))
    monkeypatch.setattr(model.base.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(TwigVLMError, match="batch of 2 prompts: 'flash_attention_2' takes no mask"):
        model.generate(**batched([prompt(1), prompt(2)]), max_new_tokens=3)
    assert model.base.num_layers == LAYERS
