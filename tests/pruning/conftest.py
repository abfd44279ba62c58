"""Fixtures of all tests of pruning."""

import pytest

from tests.twigs import step_costs
from twigvlm import TwigVLM


@pytest.fixture(autouse=True)
def _drafts_pay(monkeypatch):
    """Or else `auto` would measure this machine."""
    monkeypatch.setattr(TwigVLM, "costs", lambda self: step_costs(draft=0.1))
