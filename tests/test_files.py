"""Files that are replaced whole or not at all."""

import pytest

from twigvlm import TwigVLMError
from twigvlm.files import replacing


def test_a_name_that_no_file_can_have_is_one_line(tmp_path):
    with pytest.raises(TwigVLMError, match="name too long"), replacing(tmp_path / ("x" * 300)):
        pytest.fail("there is nothing to write to")
