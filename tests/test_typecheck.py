"""Shapes are checked: at the first calls of each test, and now and then later."""

import jaxtyping
import pytest
import torch
from jaxtyping import TypeCheckError

from tests import typecheck
from twigvlm.base.packing import valid_mask

WRONG = ("three",)


def refused():
    """Whether a call that contradicts its annotations is refused before it is made."""
    try:
        valid_mask(WRONG, 3, torch.device("cpu"))
    except TypeCheckError:
        return True
    except Exception:
        return False
    return False


def test_the_first_calls_are_checked():
    assert all(refused() for _ in range(20))


@pytest.mark.skipif("config.getoption('all_shapes')", reason="every call is checked")
def test_later_calls_are_checked_now_and_then():
    jaxtyping.config.calls = typecheck.FIRST
    found = [refused() for _ in range(3 * typecheck.ONE_IN)]
    assert 0 < sum(found) < len(found)
