"""FitPrune, whose schedule is calibrated: its scores against eager maps, its budget, and exactness behind it."""

import pytest
import torch

from tests.families import LAYERS, prompt, tiny
from twigvlm import TwigConfig, TwigVLM
from twigvlm.errors import TwigVLMError
from twigvlm.pruning.cut import average_visual
from twigvlm.pruning.methods import make_pruner
from twigvlm.pruning.methods.fitprune import FitPrune


@pytest.fixture(scope="module")
def model():
    return TwigVLM.grow(tiny("llava", "eager"), TwigConfig(2, 2))


def test_calibrated_schedule(model, tmp_path):
    prompts = [prompt(model.model, "llava", "images", seed) for seed in range(3)]
    pruner = FitPrune.calibrated(model.base, prompts, 0.5)
    assert len(pruner.kept) == LAYERS - 1
    assert list(pruner.kept) == sorted(pruner.kept, reverse=True)
    assert (1 + sum(pruner.kept)) / LAYERS == pytest.approx(0.5, abs=0.03)  # a token more or less in each prompt
    for retain in (14, 16, 20, 30):
        assert average_visual(pruner.cuts(retain, 32, LAYERS), 32, LAYERS) == pytest.approx(retain, abs=0.5)
    pruner.save_pretrained(tmp_path / "schedule")
    assert make_pruner(f"fitprune:{tmp_path / 'schedule'}") == pruner
    inputs, options = prompts[0], {"pruner": f"fitprune:{tmp_path / 'schedule'}", "max_new_tokens": 6}
    plain = model.generate(**inputs, **options, retain=16)
    chain = {"speculate": "chain", "draft_threshold": 0.01}
    assert torch.equal(model.generate(**inputs, **options, retain=16, **chain), plain)
    assert torch.equal(model.generate(**inputs, **options, retain=32), model.generate(**inputs, max_new_tokens=6))


@torch.no_grad()
def test_scores_are_the_base_s_own_attention(model):
    inputs = prompt(model.model, "llava", "images")
    visual = model.base.visual_mask(inputs["input_ids"])[0].nonzero()[:, 0]
    rows = model.model(**inputs, output_attentions=True).attentions[0][0].amax(0)
    scores = rows[visual].mean(0) * rows[int(visual[-1]) + 1 :].sum(0)
    pruner = FitPrune((0.5,) * (LAYERS - 1))
    output = model.generate(**inputs, pruner=pruner, retain=18, max_new_tokens=1, return_dict_in_generate=True)
    expected = visual[scores[visual].topk(len(output.kept_indices[0])).indices].sort().values
    assert output.kept_indices[0].tolist() == expected.tolist()


def test_what_cannot_be_calibrated_is_refused(model):
    with pytest.raises(TwigVLMError, match=r"share=0\.1"):
        FitPrune.calibrated(model.base, [], 0.1)
    with pytest.raises(TwigVLMError, match="none of them has visual tokens"):
        FitPrune.calibrated(model.base, [prompt(model.model, "llava", "text")], 0.5)
    with pytest.raises(TwigVLMError, match="has 2 shares, but this base needs 5"):
        FitPrune((0.5, 0.5)).cuts(16, 32, LAYERS)
    for kept in ((), (0.5, 0.0), (0.5, 0.6), (1.5, 0.5), (float("nan"),)):
        with pytest.raises(TwigVLMError, match="kept: must be shares of more than 0 and at most 1 that never grow"):
            FitPrune(kept)
