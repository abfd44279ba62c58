"""Calibrated costs."""

from itertools import count

from tests.tiny import tiny_llava
from twigvlm.config import TwigConfig
from twigvlm.model import TwigVLM
from twigvlm.speculation import costs


def test_a_slow_timing_does_not_make_larger_passes_dear(monkeypatch):
    model = TwigVLM.grow(tiny_llava(context=costs.PROMPT), TwigConfig(1, 2))
    calls, now = count(), [0.0]

    def clock():  # four readings to enter the twig twice, four a pass, two passes a size; those of the second size are slow
        now[0] += 100.0 if (next(calls) - 4) // 8 == 1 else 1.0
        return now[0]

    monkeypatch.setattr(costs, "clock_of", lambda device: clock)
    found = costs.calibrate(model.base, model.twig, repeats=1)
    for table, seconds in ((found.trunk, 1.0), (found.draft, 2.0), (found.verify, 1.0)):
        assert table[0] == 0.0
        assert set(table[1:]) == {seconds}
    assert found.fill == 1.0 / costs.PROMPT
