"""Tiny models of all tests of this folder."""

import pytest

from tests.tiny import tiny_llava
from twigvlm import TwigConfig, TwigVLM


@pytest.fixture(scope="module")
def hf_model():
    return tiny_llava(3)


@pytest.fixture(scope="module")
def model():
    return TwigVLM.grow(tiny_llava(3, deep_scale=0.05, from_layer=3), TwigConfig(2, 2))
