"""Calibration for `auto`: once per machine and model, however many ask first."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tests.tiny import prompt, tiny_llava
from tests.twigs import step_costs
from twigvlm import TwigConfig, TwigVLM
from twigvlm.speculation import costs


@pytest.fixture
def calibrations(monkeypatch, tmp_path):
    """Stands for the measurement, which tests elsewhere: what it was asked for."""
    asked = []

    def calibrate(base, twig):
        asked.append(base)
        return step_costs(fill=float(len(asked)))

    monkeypatch.setattr(costs, "calibrate", calibrate)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def grown(**options):
    return TwigVLM.grow(tiny_llava(**options), TwigConfig(2, 2))


def test_concurrent_first_calls_calibrate_once(calibrations):
    model, together = grown(), Barrier(4)
    inputs = prompt()

    def answer(_):
        together.wait()
        return model.generate(**inputs, max_new_tokens=3, speculate="auto").tolist()

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(answer, range(4)))
    assert len(calibrations) == 1
    assert answers.count(answers[0]) == 4


def test_another_process_reads_the_file_and_another_model_does_not(calibrations):
    first = grown().costs()
    assert grown().costs() == first
    assert len(calibrations) == 1
    grown(layers=5).costs()
    assert len(calibrations) == 2


def test_twigs_whose_passes_cost_different_amounts_share_no_file(calibrations):
    """Their layers have the same weights: one follows a longer trunk, and one uses fewer rows of the base's head."""
    base = tiny_llava()
    TwigVLM.grow(base, TwigConfig(2, 2)).costs()
    TwigVLM.grow(base, TwigConfig(3, 2)).costs()
    TwigVLM.grow(base, TwigConfig(2, 2, head="shared")).costs()
    TwigVLM.grow(base, TwigConfig(2, 2, head="shared", draft_vocabulary=10), torch.arange(10)).costs()
    assert len(calibrations) == 4


def test_calibrate_measures_again(calibrations):
    model = grown()
    first, second = model.costs(), model.calibrate()
    assert (first.fill, second.fill) == (1.0, 2.0)
    assert model.costs() == grown().costs() == second


def test_a_broken_file_is_measured_again(calibrations, tmp_path):
    grown().costs()
    (file,) = (tmp_path / "twigvlm").iterdir()
    for broken in ("", "[]", '{"trunk": 1}'):
        file.write_text(broken)
        assert grown().costs().verify
    assert len(calibrations) == 4


def test_where_nothing_can_be_written_it_calibrates_all_the_same(calibrations, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert grown().costs().verify
