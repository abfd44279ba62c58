"""Tiny models of all tests of this folder."""

import pytest

from tests.tiny import tiny_llava


@pytest.fixture(scope="module")
def hf_model():
    return tiny_llava(3)
