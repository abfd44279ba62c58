"""The budget that the lmms-eval plug-in gives each prompt, and the random choice that each question gets."""

from unittest.mock import Mock

import pytest
from PIL import Image

from twigvlm.inputs import user_turn
from twigvlm.integrations.lmms_eval.answering import Answerer, Setting
from twigvlm.pruning.methods.random import RandomTokens

GREEDY = {"do_sample": False}
NEW = 4


def question():
    return [user_turn("What?", [Image.radial_gradient("L").resize((20, 12))])]


def test_a_prompt_just_above_the_budget_keeps_all_that_final_wipe_allows(model, processor):
    setting = Setting("twig", 15, final_wipe=model.twig.config.trunk_layers + 1, final_share=0.0)
    (one,) = Answerer(model.base, model, processor, setting).answer([question()], NEW, GREEDY)
    assert one.visual == [16]
    most = 16 * (model.twig.config.trunk_layers + 1) / model.base.num_layers
    assert one.average_visual == [pytest.approx(most)]


def test_random_choices_differ_between_questions_of_the_same_text(model, processor, monkeypatch):
    asked = Mock(wraps=model.generate)
    monkeypatch.setattr(model, "generate", asked)
    answerer = Answerer(model.base, model, processor, Setting("random:0", 8, seed=5))
    assert len(answerer.answer([question()] * 2, NEW, GREEDY)) == 2
    answerer.answer([question()], NEW, GREEDY, 2)
    seeds = [5, 6, 7]
    assert [call.kwargs["pruner"] for call in asked.call_args_list] == [RandomTokens(0, seed=seed) for seed in seeds]
