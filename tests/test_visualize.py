from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaImageProcessor, LlavaOnevisionImageProcessor

from tests.families import tiny
from twigvlm.errors import TwigVLMError
from twigvlm.visualize import MAX_SIDE, highlight, patch_grid, seen_box, side_by_side


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def inside(image, row, column, side=16, margin=4):
    pixels = np.asarray(image)
    return pixels[
        row * side + margin : (row + 1) * side - margin, column * side + margin : (column + 1) * side - margin
    ]


def test_kept_patches_are_unchanged_and_others_faded(picture):
    before = picture.tobytes()
    shown = highlight(picture, [0, 6], grid=(3, 4), min_side=48)
    assert shown.size == picture.size
    assert shown.mode == "RGB"
    assert picture.tobytes() == before
    for index in range(12):
        row, column = divmod(index, 4)
        same = np.array_equal(inside(shown, row, column), inside(picture, row, column))
        assert same == (index in (0, 6))
        if index not in (0, 6):
            faded = inside(shown, row, column)
            assert faded.min() > 150
            assert (faded == faded[..., :1]).all()


def test_all_kept_shows_the_picture(picture):
    shown = highlight(picture, range(12), grid=(3, 4), min_side=48)
    assert np.array_equal(np.asarray(shown)[4:-4, 4:-4], np.asarray(picture)[4:-4, 4:-4])


def test_small_pictures_are_enlarged(picture):
    assert highlight(picture, [], grid=(3, 4), min_side=96).size == (128, 96)


def test_box_places_the_grid(picture):
    shown = highlight(picture, [0], grid=(3, 3), box=(8, 0, 56, 48), min_side=48)
    assert np.array_equal(np.asarray(shown)[4:12, 12:20], np.asarray(picture)[4:12, 12:20])
    assert np.asarray(shown)[4:12, :6].min() > 150


@pytest.mark.parametrize(
    ("options", "box"),
    [
        ({}, (100, 0, 200, 100)),
        ({"do_pad": True}, (0, -100, 300, 200)),
        ({"do_center_crop": False}, None),
    ],
)
def test_the_box_is_what_the_processor_shows_the_model(options, box):
    seen = Mock(spec=["image_processor"], image_processor=LlavaImageProcessor(**options))
    assert seen_box(seen, Image.new("RGB", (300, 100))) == box


def test_a_processor_that_pads_tiles_shows_the_whole_picture():
    seen = Mock(spec=["image_processor"], image_processor=LlavaOnevisionImageProcessor(do_pad=True))
    assert seen_box(seen, Image.new("RGB", (300, 100))) is None


def test_a_grid_may_reach_beyond_the_picture(picture):
    """As where the model sees a square around it."""
    shown = highlight(picture, [4], grid=(4, 4), box=(0, -8, 64, 56), min_side=48)
    assert shown.size == picture.size
    assert np.array_equal(np.asarray(shown)[12:20, 4:12], np.asarray(picture)[12:20, 4:12])
    assert np.asarray(shown)[28:, 20:].min() > 150


@pytest.mark.parametrize("index", [-1, 12])
def test_index_outside_the_grid(picture, index):
    with pytest.raises(TwigVLMError, match=r"kept index -?\d+: must be 0 to 11 in a grid of 3x4 patches"):
        highlight(picture, [index], grid=(3, 4))


def test_a_long_strip_is_not_enlarged_without_bounds():
    strip = Image.new("RGB", (1, 3000))
    assert highlight(strip, [0], (2, 2)).height == MAX_SIDE


def test_pictures_side_by_side_stay_below_the_limit():
    sheet = side_by_side([Image.new("RGB", (6720, 672), "red")] * 4, ["a " * 200, "b", "c", "d"])
    assert max(sheet.size) <= MAX_SIDE
    assert sheet.getpixel((5, 5)) == (255, 0, 0)


def test_the_grid_is_that_of_one_whole_image():
    square, qwen = tiny("llava"), tiny("qwen2_5_vl")
    square.config.image_seq_length = 16
    assert patch_grid(square, 16) == (4, 4)
    assert patch_grid(square, 32) is None
    merge = qwen.config.vision_config.spatial_merge_size
    size = torch.tensor([[1, 3 * merge, 5 * merge]])
    assert patch_grid(qwen, 15, {"image_grid_thw": size}) == (3, 5)
    assert patch_grid(qwen, 30, {"image_grid_thw": size.repeat(2, 1)}) is None
    assert patch_grid(qwen, 15) is None
