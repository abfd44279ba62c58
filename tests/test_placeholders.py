"""Placeholders that do not match the pictures are one line in every family, before anything runs where the inputs tell."""

import pytest
import torch

from tests.batches import batched
from tests.families import IMAGE, TINY, TRUNK, TWIG, VIDEO, prompt, tiny
from twigvlm import TwigConfig, TwigVLM, TwigVLMError

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=TINY)
def family(request):
    base = tiny(request.param)
    return request.param, TwigVLM.grow(base, TwigConfig(TRUNK, TWIG)), prompt(base, request.param, "images")


def changed(inputs, change, names=PER_TOKEN):
    return {name: change(value) if name in names else value for name, value in inputs.items()}


def last_image(inputs):
    return int((inputs["input_ids"] == IMAGE)[0].nonzero()[-1])


def one_more(inputs):
    last = last_image(inputs)
    return changed(inputs, lambda v: torch.cat((v[:, : last + 1], v[:, last:]), dim=1))


def one_less(inputs):
    last = last_image(inputs)
    return changed(inputs, lambda v: torch.cat((v[:, :last], v[:, last + 1 :]), dim=1))


def refused(model, inputs, *words):
    with pytest.raises(TwigVLMError) as caught:
        model.generate(**inputs, max_new_tokens=2)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_one_too_many_one_too_few_and_truncated(family):
    _, model, inputs = family
    refused(model, one_more(inputs), "do not match")
    refused(model, one_less(inputs), "do not match")
    refused(model, changed(inputs, lambda v: v[:, : last_image(inputs) - 2]), "do not match")
    model.generate(**inputs, max_new_tokens=2)  # as it was


@pytest.mark.parametrize("name", [name for name, entry in TINY.items() if entry.videos])
def test_videos(name):
    base = tiny(name)
    model, inputs = TwigVLM.grow(base, TwigConfig(TRUNK, TWIG)), prompt(base, name, "video")
    model.generate(**inputs, max_new_tokens=2)
    last = int((inputs["input_ids"] == VIDEO)[0].nonzero()[-1])
    refused(model, changed(inputs, lambda v: torch.cat((v[:, : last + 1], v[:, last:]), dim=1)), "do not match")
    refused(model, changed(inputs, lambda v: torch.cat((v[:, :last], v[:, last + 1 :]), dim=1)), "do not match")


def test_a_prompt_cut_without_its_mask_or_its_token_types(family):
    _, model, inputs = family
    for name in set(PER_TOKEN[1:]) & inputs.keys():
        refused(model, changed(inputs, lambda v: v[:, :-1], names=set(PER_TOKEN) - {name}), name, "input_ids")


def test_a_batch_of_which_one_prompt_is_wrong(family):
    name, model, inputs = family
    other = prompt(model.model, name, "images", seed=1)
    refused(model, batched([inputs, one_more(other)]), "do not match")
    model.generate(**batched([inputs, other]), max_new_tokens=2)


@pytest.mark.parametrize("name", ["llava", "internvl", "gemma3", "video_llava", *GRIDS])
def test_prompts_of_a_batch_do_not_share_an_image(name):
    """As many placeholders as visual tokens in all; the first image would reach into the second prompt."""
    base = tiny(name)
    model = TwigVLM.grow(base, TwigConfig(TRUNK, TWIG))
    one, two = prompt(base, name, "images"), prompt(base, name, "images", seed=1)
    refused(model, batched([one_less(one), one_more(two)]), "do not match")


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name):
    base = tiny(name)
    model, inputs = TwigVLM.grow(base, TwigConfig(TRUNK, TWIG)), prompt(base, name, "images")
    refused(model, {k: v for k, v in inputs.items() if k != "image_grid_thw"}, "image_grid_thw is missing")
    refused(model, {**inputs, "pixel_values": inputs["pixel_values"][:-8]}, "the base refuses this")
    hidden = inputs["attention_mask"].clone()
    hidden[:, :6] = 0  # the mask hides a part of the first image, so that its positions do not come out
    refused(model, {**inputs, "attention_mask": hidden}, "the base refuses this")


def test_an_error_that_is_no_fault_of_the_prompt_is_left_as_it_is(monkeypatch):
    base = tiny("llava")
    model, inputs = TwigVLM.grow(base, TwigConfig(TRUNK, TWIG)), prompt(base, "llava", "images")
    for error in (torch.OutOfMemoryError("no room"), KeyError("a bug")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(base.model.vision_tower, "forward", fail)
        with pytest.raises(type(error)):
            model.generate(**inputs, max_new_tokens=2)
