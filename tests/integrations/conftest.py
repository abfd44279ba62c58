"""What tests of the lmms-eval plug-in share."""

import pytest

from tests.tiny_processor import tiny_processor
from tests.twigs import grown


@pytest.fixture(scope="module")
def model():
    return grown()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()
