"""BaseVLM against the model that it opens."""

from contextlib import nullcontext

import pytest
import torch

from tests.families import prompt as family_prompt
from tests.families import tiny
from tests.tiny import IMAGE_TOKEN, VISUAL, prompt, tiny_llava
from twigvlm.base.layers import project_keys_values
from twigvlm.base.token_inputs import slice_tokens
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.kv.cache import KVCache
from twigvlm.model import TwigVLM


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_layers_in_two_ranges_are_the_whole_model(attention):
    model = tiny_llava(attention=attention)
    base, inputs = BaseVLM(model), prompt()
    expected = model(**inputs, output_hidden_states=True)
    captured = base.prompt(**inputs)
    assert torch.equal(captured.hidden, expected.hidden_states[0])
    assert int(captured.visual_mask.sum()) == VISUAL
    tokens, masks = base.token_inputs(captured), base.masks()
    middle = base.run_layers(captured.hidden, 0, 2, tokens, masks)
    torch.testing.assert_close(middle, expected.hidden_states[2])
    end = base.run_layers(middle, 2, base.num_layers, tokens, masks)
    torch.testing.assert_close(base.logits(end), expected.logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_in_chunks_with_a_cache_as_in_one_pass(attention):
    base, inputs = BaseVLM(tiny_llava(attention=attention)), prompt()
    captured = base.prompt(**inputs)
    tokens, masks = base.token_inputs(captured), base.masks()
    expected = base.run_layers(captured.hidden, 0, 3, tokens, masks)
    cache = KVCache(3, (), 4, base.device)
    row = cache.claim(1)
    for start, stop in ((0, 20), (20, 21), (21, 25)):
        part = captured.hidden[:, start:stop]
        got = base.run_layers(part, 0, 3, slice_tokens(tokens, start, stop), masks, cache.view(row))
        torch.testing.assert_close(got, expected[:, start:stop])
    first = project_keys_values(base.layers[0], captured.hidden, tokens)
    torch.testing.assert_close(cache.contents(0, row), first)


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_a_padded_row_is_as_if_alone(left):
    base = BaseVLM(tiny_llava())
    alone, other = prompt(1, after=4), prompt(2, after=9)
    width = other["input_ids"].shape[1]
    missing = width - alone["input_ids"].shape[1]
    padding = (missing, 0) if left else (0, missing)
    ids = torch.nn.functional.pad(alone["input_ids"], padding)
    mask = torch.nn.functional.pad(alone["attention_mask"], padding)
    pair = {
        "input_ids": torch.cat((ids, other["input_ids"])),
        "attention_mask": torch.cat((mask, other["attention_mask"])),
        "pixel_values": torch.cat((alone["pixel_values"], other["pixel_values"])),
    }
    results = []
    for inputs in (pair, alone):
        captured = base.prompt(**inputs)
        assert captured.lengths[0] == width - missing
        results.append(base.run_layers(captured.hidden, 0, 6, base.token_inputs(captured), base.masks())[0])
    torch.testing.assert_close(results[0][: width - missing], results[1])


@torch.no_grad()
def test_the_base_runs_as_before_after_a_prompt_and_after_one_that_it_refuses():
    model = tiny_llava()
    base, before = BaseVLM(model), model(**prompt()).logits
    base.prompt(**prompt())
    assert torch.equal(model(**prompt()).logits, before)
    with pytest.raises(
        TwigVLMError, match=r"the base refuses this prompt \(.*exactly one of input_ids or inputs_embeds"
    ):
        base.prompt(**prompt(), inputs_embeds=torch.zeros(1, 25, 32))
    assert torch.equal(model(**prompt()).logits, before)


def test_an_unknown_family_says_what_is_needed():
    model = tiny_llava()
    model.config.__class__.model_type, before = "unheard_of", model.config.model_type
    try:
        with pytest.raises(TwigVLMError, match=r"'unheard_of' is not supported.*families\.py"):
            BaseVLM(model)
    finally:
        model.config.__class__.model_type = before


def test_a_model_without_a_config_is_refused():
    with pytest.raises(TwigVLMError, match="'Linear' is not supported"):
        BaseVLM(torch.nn.Linear(2, 2))


def test_growing_rotary_frequencies_are_refused():
    model = tiny_llava()
    model.config.text_config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(TwigVLMError, match="rope_type='dynamic'"):
        BaseVLM(model)


def test_flex_attention_is_refused():
    model = tiny_llava()
    model.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(TwigVLMError, match="attn_implementation='flex_attention'"):
        BaseVLM(model)


def test_a_prompt_longer_than_the_context_is_refused():
    base = BaseVLM(tiny_llava(context=20))
    with pytest.raises(TwigVLMError, match="25 tokens, the base's context only 20"):
        base.prompt(**prompt())


def test_padding_does_not_count_against_the_context():
    model, inputs = tiny_llava(context=26), prompt()
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (7, 0))
    expected = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert torch.equal(TwigVLM.grow(model, TwigConfig(2, 2)).generate(**inputs, max_new_tokens=1), expected)
    with pytest.raises(TwigVLMError, match="25 tokens, the base's context only 20"):
        BaseVLM(tiny_llava(context=20)).prompt(**inputs)


def test_too_little_memory_is_not_blamed_on_the_prompt(monkeypatch):
    model = tiny_llava()

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model.model.vision_tower, "forward", fail)
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):
        BaseVLM(model).prompt(**prompt())


def test_a_picture_takes_fewer_positions_of_m_rope_than_it_has_tokens():
    model = tiny("qwen2_5_vl")
    inputs = family_prompt(model, "qwen2_5_vl", "images")
    needed = int(BaseVLM(model).prompt(**inputs).position_ids.max()) + 1
    assert needed < inputs["input_ids"].shape[1]
    for context, refused in ((needed, False), (needed - 1, True), (4, True)):
        model.config.text_config.max_position_embeddings = context
        grown = TwigVLM.grow(model, TwigConfig(2, 2))
        words = f"more positions than the {context}|only {context}"
        with pytest.raises(TwigVLMError, match=words) if refused else nullcontext():
            grown.generate(**inputs, max_new_tokens=1)


def test_images_and_placeholders_must_come_together():
    base = BaseVLM(tiny_llava())
    ids, pixels = prompt()["input_ids"], prompt()["pixel_values"]
    base.check_images(ids, {"pixel_values": pixels})
    with pytest.raises(TwigVLMError, match="No image placeholder"):
        base.check_images(ids[ids != IMAGE_TOKEN][None], {"pixel_values": pixels})
    with pytest.raises(TwigVLMError, match="16 image placeholders but no image"):
        base.check_images(ids, {})
    base.check_images(ids[ids != IMAGE_TOKEN][None], {})


def test_positions_of_text_alone_are_on_the_three_axes_of_m_rope():
    """Some versions of transformers take no others."""
    base, axes = BaseVLM(tiny("qwen2_5_vl")), []
    base.decoder.rotary_emb.register_forward_pre_hook(lambda module, given: axes.append(tuple(given[1].shape)))
    base.token_inputs(base.text_prompt(5))
    assert axes == [(3, 1, 5)]
