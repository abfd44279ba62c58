"""Every family's twig: as it is grown, saved and loaded, in bfloat16, in two parts, and after a step of training."""

import pytest
import torch

from tests.families import TINY, TRUNK, TWIG, tiny
from tests.grown_families import CHAIN, answer, grown, inputs_of, visual_tokens
from twigvlm import TwigConfig, TwigVLM
from twigvlm.training.data.dataset import IGNORE
from twigvlm.training.distill import Student
from twigvlm.training.options import Stage1Config, Stage2Config
from twigvlm.training.reinforce import Policy


@pytest.mark.parametrize("name", TINY)
def test_the_twig_follows_the_base_s_config(name):
    model = grown(name)
    for layer in (*model.base.layers, *model.twig.layers):
        assert layer.self_attn.config is model.base.config


@pytest.mark.parametrize("name", TINY)
def test_a_random_twig_starts_with_neutral_norms(name):
    base = tiny(name)
    norm = TwigVLM.grow(base, TwigConfig(TRUNK, TWIG, init="random")).twig.norm
    states = torch.randn(3, 32)
    torch.testing.assert_close(
        norm(states), states * states.square().mean(-1, keepdim=True).rsqrt(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", TINY)
def test_saved_and_loaded_answers_alike(name, tmp_path):
    model, inputs = grown(name), inputs_of(name, "images")
    model.save_pretrained(tmp_path)
    loaded = TwigVLM.from_pretrained(tiny(name), tmp_path)
    options = {**CHAIN, "keep": 4, "max_new_tokens": 8, "return_dict_in_generate": True}
    outputs = [one.generate(**inputs, **options) for one in (model, loaded)]
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist()
    assert outputs[0].accepted_lengths == outputs[1].accepted_lengths


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_runs(name):
    model = TwigVLM.grow(tiny(name).to(torch.bfloat16), TwigConfig(TRUNK, TWIG))
    inputs = {
        key: value.to(torch.bfloat16) if value.is_floating_point() else value
        for key, value in inputs_of(name, "images").items()
    }
    output = model.generate(**inputs, **CHAIN, keep=4, final_wipe=5, max_new_tokens=6)
    assert len(answer(output, inputs)) == 6


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_the_twig_in_two_parts_is_the_twig(name):
    """As stage 1 runs it; features that enter the base's first layers enter no twig layer again."""
    base, twig = grown(name).base, grown(name).twig
    captured = base.prompt(**inputs_of(name, "images"))
    tokens, masks = base.token_inputs(captured), base.masks()
    hidden = base.run_layers(captured.hidden, 0, TRUNK, tokens, masks)
    last_input, states = twig.forward_with_last_input(hidden, tokens, masks)
    torch.testing.assert_close(last_input, twig.last_input(hidden, tokens, masks))
    torch.testing.assert_close(states, twig(hidden, tokens, masks))


@pytest.mark.parametrize("name", TINY)
def test_a_step_of_each_stage_changes_the_twig_and_nothing_else(name):
    model = TwigVLM.grow(tiny(name, "sdpa"), TwigConfig(TRUNK, TWIG, pruning_head=True))
    inputs = {key: value for key, value in inputs_of(name, "images").items() if key != "attention_mask"}
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = IGNORE
    base = {key: value.clone() for key, value in model.model.state_dict().items()}
    learners = (
        (Student(model, Stage1Config()), {"twig"}),
        (Policy(model, Stage2Config(group=4, budgets=(visual_tokens(name, "images") * 0.6,)), 10), {"head"}),
    )
    for learner, parts in learners:
        before = {key: value.clone() for key, value in model.twig.state_dict().items()}
        model.twig.requires_grad_("twig" in parts)
        model.twig.pruning_head.requires_grad_(True)
        place = {} if "twig" in parts else {"step": 0, "part": 0}
        loss = learner(labels=labels, **inputs, **place)["loss"]
        assert torch.isfinite(loss)
        loss.backward()
        optimiser = torch.optim.SGD([p for p in model.twig.parameters() if p.grad is not None], lr=0.1)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        assert all(torch.isfinite(value).all() for value in model.twig.state_dict().values())
        changed = {key for key, value in model.twig.state_dict().items() if not torch.equal(value, before[key])}
        assert any(key.startswith("pruning_head") for key in changed)
        assert any(not key.startswith("pruning_head") for key in changed) == ("twig" in parts)
    assert all(torch.equal(value, base[key]) for key, value in model.model.state_dict().items())
