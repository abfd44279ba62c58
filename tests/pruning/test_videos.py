"""Videos whose frames go through a vision tower of their own, with their CLS tokens (Video-LLaVA), and videos that are pooled."""

from functools import cache

import pytest
import torch

from tests.batches import batched
from tests.families import VIDEO, prompt, tiny
from twigvlm import TwigVLM
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.methods import METHODS, make_pruner
from twigvlm.pruning.methods.fastervlm import FasterVLM

NAMES = [name for name in METHODS if name not in ("random", "fitprune")] + ["random:0"]
FRAME = 17  # patches of a frame, and its CLS token


@cache
def model(family="video_llava"):
    return TwigVLM.without_twig(tiny(family))


def inputs_of(kind, seed=0):
    """A prompt with images and a video, or with a video alone."""
    inputs = prompt(model().model, "video_llava", "video", seed)
    if kind == "images and video":
        return inputs
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randint(2, VIDEO, (1, count), generator=generator) for count in (3, 4))
    ids = torch.cat((before, torch.full((1, 4 * FRAME), VIDEO), after), dim=1)
    pixels = {"pixel_values_videos": inputs["pixel_values_videos"]}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def visual(inputs):
    return int(model().base.visual_mask(inputs["input_ids"]).sum())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["images and video", "video"])
def test_every_method_prunes_videos(name, kind):
    inputs = inputs_of(kind)
    budget = 0.6 * visual(inputs)
    options = {"pruner": name, "retain": budget, "max_new_tokens": 3}
    output = model().generate(**inputs, **options, return_dict_in_generate=True)
    assert abs(output.average_visual[0] - budget) <= 0.5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["images and video", "video"])
def test_features_and_attention_are_the_towers_own(kind):
    """Against the maps of both towers; a CLS token that the language model sees has what it gives itself."""
    inputs, base = inputs_of(kind), model().base
    with base.watch_vision() as watch:
        captured = base.prompt(**inputs, vision=watch)
    vision = captured.vision
    source = vision.source[0, captured.visual_mask[0]]
    assert sorted(source.tolist()) == list(range(len(vision.projected)))
    assert torch.equal(captured.hidden[captured.visual_mask], vision.projected[source])
    eager = tiny("video_llava", "eager")
    frames = inputs["pixel_values_videos"].flatten(0, 1)
    towers = [(eager.model.video_tower, frames)]
    if kind != "video":
        towers.insert(0, (eager.model.image_tower, inputs.get("pixel_values", inputs.get("pixel_values_images"))))
    expected, last, sizes = [], [], []
    for tower, pixels in towers:
        *_, before, after = tower(pixels, output_attentions=True).attentions
        shown = slice(tower is eager.model.image_tower, None)
        expected.append(before[:, :, 0, shown].mean(1).flatten())
        last.append(after[:, :, 0, shown].mean(1).flatten())
        sizes += [before[0, 0, 0, shown].numel()] * len(pixels)
    torch.testing.assert_close(vision.importance(), torch.cat(expected), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(vision.importance("sum"), 2 * torch.cat(expected), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(vision.last_importance, torch.cat(last), rtol=1e-3, atol=1e-5)
    assert vision.image.bincount().tolist() == sizes
    assert sorted(vision.cls) == ([] if kind == "video" else [0, 1])
    for tokens in (vision.keys, vision.last_keys, vision.single_head):
        assert len(tokens) == len(vision.projected)


def test_each_frame_keeps_what_its_cls_token_attends_to():
    inputs = inputs_of("video")
    with torch.no_grad(), model().base.watch_vision() as watch:
        vision = model().base.prompt(**inputs, vision=watch).vision
    output = model().generate(**inputs, pruner=FasterVLM(), retain=20, max_new_tokens=1, return_dict_in_generate=True)
    ranked = vision.importance().view(4, FRAME).argsort(dim=1, descending=True, stable=True)[:, :5].sort().values
    expected = 3 + ranked + FRAME * torch.arange(4)[:, None]
    assert output.kept_indices[0].tolist() == expected.flatten().tolist()


def test_a_batch_of_images_and_videos_is_as_if_alone():
    rows = [inputs_of("images and video"), inputs_of("video", 1), prompt(model().model, "video_llava", "images", 2)]
    batch = batched(rows)
    width = batch["input_ids"].shape[1]
    for name in ("visionzip", "prunesid", "mustdrop"):
        options = {"pruner": name, "retain": 20, "max_new_tokens": 4}
        alone = [model().generate(**row, **options)[0, row["input_ids"].shape[1] :].tolist() for row in rows]
        assert model().generate(**batch, **options)[:, width:].tolist() == alone


@pytest.mark.parametrize(
    ("family", "words"),
    [("llava_next_video", "pools patches"), ("llava_onevision", "changes them after its projector")],
)
def test_videos_that_a_base_pools_are_refused_with_the_reason(family, words):
    """Next to images of which all is known; what remains to be chosen works."""
    inputs = prompt(model(family).model, family, "video")
    for name in ("fastervlm", "mustdrop"):
        with pytest.raises(TwigVLMError, match=f"{words}.*choose a method that does not need .* 'fastv'") as caught:
            model(family).generate(**inputs, pruner=name, retain=60, max_new_tokens=1)
        assert "\n" not in str(caught.value)
    assert model(family).generate(**inputs, pruner=make_pruner("fastv"), retain=70, max_new_tokens=1).numel()
