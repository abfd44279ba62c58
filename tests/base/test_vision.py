"""What a vision tower computes on the way, against the base's own features and eager attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.families import IMAGE, prompt, tiny
from twigvlm.base.vision import match_rows
from twigvlm.base.vlm import BaseVLM


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_equal_rows_are_matched_in_their_order(rows, among):
    table = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    seen, expected = {}, []
    for row in rows:
        where = [index for index, other in enumerate(among) if other == row]
        expected.append(where[seen.get(row, 0) % len(where)] if where else -1)
        seen[row] = seen.get(row, 0) + 1
    assert match_rows(table[torch.tensor(rows, dtype=torch.long)], table[among]).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "pixtral", "qwen2_5_vl"])
def test_vision_is_the_base_s_own(name):
    """Features, and rows of attention against the maps that the tower itself makes eagerly."""
    base = BaseVLM(tiny(name))
    inputs = prompt(base.model, name, "images")
    with base.watch_vision() as watch:
        captured = base.prompt(**inputs, vision=watch)
    vision = captured.vision
    is_patch = vision.source >= 0
    assert torch.equal(captured.hidden[is_patch], vision.projected[vision.source[is_patch]])
    assert not is_patch[~captured.visual_mask].any()
    torch.testing.assert_close(vision.project(vision.features), vision.projected, rtol=1e-4, atol=1e-5)
    maps = _maps(tiny(name, "eager"), inputs)
    if name.startswith("llava") and name != "llava_onevision":
        expected = torch.cat([each[:, :, 0, 1:].mean(1).flatten() for each in maps])
    else:
        received = torch.cat([each.mean(1).mean(1).flatten() for each in maps])
        expected = received.unflatten(0, (-1, 4)).mean(1) if name == "qwen2_5_vl" else received
    torch.testing.assert_close(vision.importance(), expected, rtol=1e-3, atol=1e-5)
    images = [int((inputs["input_ids"] == IMAGE).sum())] if name == "pixtral" else None
    assert images is None or vision.image.bincount().sum() == images[0]


def _maps(model, inputs):
    """Attention maps of the block whose output the features are, from its eager attention."""
    tower = getattr(model.model, "vision_tower", None) or model.model.visual
    blocks = next(part for part in tower.modules() if isinstance(part, torch.nn.ModuleList))
    block = blocks[-2] if getattr(model.config, "vision_feature_layer", -1) == -2 else blocks[-1]
    attention = next(getattr(block, each) for each in ("self_attn", "attn", "attention") if hasattr(block, each))
    found, eager = [], torch.nn.functional.softmax

    def softmax(*args, **kwargs):
        shares = eager(*args, **kwargs)
        found.append(shares)
        return shares

    def enter(*_):
        torch.nn.functional.softmax = softmax

    def leave(*_):
        torch.nn.functional.softmax = eager

    hooks = [attention.register_forward_pre_hook(enter), attention.register_forward_hook(leave)]
    try:
        model(**inputs)
    finally:
        torch.nn.functional.softmax = eager
        for hook in hooks:
            hook.remove()
    if len(found) == 1 and found[0].shape[0] == 1 and "image_sizes" in inputs and found[0].shape[-1] == 16:
        return [found[0][:, :, :8, :8], found[0][:, :, 8:, 8:]]  # Pixtral's images lie in one sequence
    return found


def test_watching_is_of_one_thread_s_prompt_alone():
    base, inputs = BaseVLM(tiny("llava")), prompt(tiny("llava"), "llava", "images")
    with torch.no_grad(), base.watch_vision() as vision:
        assert base.prompt(**inputs).vision is None
        seen = base.prompt(**inputs, vision=vision).vision
    rows = seen.projected[seen.source[seen.source >= 0]]
    with torch.no_grad():
        assert torch.equal(base.prompt(**inputs).hidden[seen.source >= 0], rows)
