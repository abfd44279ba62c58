"""Images whose features or attention are degenerate: every method still keeps as many tokens as it is asked to."""

import pytest
import torch

from tests.pruning.image_tokens import image
from twigvlm.pruning.methods.cdpruner import CDPruner
from twigvlm.pruning.methods.divprune import DivPrune
from twigvlm.pruning.methods.fastervlm import FasterVLM
from twigvlm.pruning.methods.holov import HoloV
from twigvlm.pruning.methods.prumerge import PruMerge
from twigvlm.pruning.methods.prunesid import PruneSID
from twigvlm.pruning.methods.scope import Scope
from twigvlm.pruning.methods.visionzip import VisionZip
from twigvlm.pruning.methods.vispruner import VisPruner
from twigvlm.pruning.select import diverse, unit

METHODS = (CDPruner, DivPrune, FasterVLM, HoloV, PruMerge, PruneSID, Scope, VisionZip, VisPruner)
VALUES = {"zero": 0.0, "equal": 1.0, "nan": float("nan"), "infinite": float("inf")}


def tensors_of(tokens, what):
    if what != "attention":
        return [getattr(tokens.vision, what)]
    return [*tokens.vision._importance.values(), tokens.vision.single_head]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("what", ["features", "projected", "keys", "last_keys", "attention"])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_met_whatever_the_tower_makes_of_an_image(method, what, value):
    for count in (2, 5, 40):
        for part in (slice(None), slice(count, count + 2)):  # everything, or two tokens of the image
            tokens = image(3, count)
            for tensor in tensors_of(tokens, what):
                tensor[part] = VALUES[value]
            for keep in {1, count // 2, count - 1}:
                picked = method().pick(tokens, keep)
                assert len(set(picked.indices.tolist())) == len(picked.indices) == keep
                assert picked.states is None or len(picked.states) == keep
                if value in ("zero", "equal") and picked.states is not None:
                    assert picked.states.isfinite().all()


def test_tokens_without_attention_are_kept_last():
    tokens, bad = image(3, 40), torch.tensor([0, 7, 39])
    for tensor in tensors_of(tokens, "attention"):
        tensor[40 + bad] = float("nan")
    for method in (FasterVLM(), VisPruner(important=1.0), VisionZip(contextual=0.0), PruMerge(attended=1.0)):
        first = isinstance(method, VisionZip)  # its CLS token takes the position of a dropped patch
        kept = method.pick(tokens, 12).indices[first : None if first else 11]
        assert not torch.isin(kept, bad).any()


def test_features_without_a_direction_resemble_nothing():
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    assert unit(features).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0], [0, 0], [0, 0]]


def test_a_state_without_a_direction_does_not_decide_about_the_others():
    generator = torch.Generator().manual_seed(0)
    states, scores = torch.randn(1, 12, 8, generator=generator), torch.rand(1, 12, generator=generator)
    states[0, 5], visual = float("nan"), torch.ones(1, 12, dtype=torch.bool)
    chosen = diverse(scores, states, visual, [4])
    zero = torch.where(states.isnan(), 0.0, states)
    assert torch.equal(chosen, diverse(scores, zero, visual, [4]))
    assert chosen.sum() == 4
