import pytest
import torch

from tests.tiny import VISUAL, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.variants import NONE, Variant, answer_all, make_variants
from twigvlm.pruning.methods.base_layer import BaseLayerAttention
from twigvlm.pruning.methods.pruning_head import HeadScores
from twigvlm.pruning.methods.random import RandomScores, RandomTokens
from twigvlm.pruning.methods.twig_attention import TwigAttention

SCORERS = {
    "twig": HeadScores(),
    "refocus:0.9": HeadScores(),
    "diverse+refocus:0.9": HeadScores(),
    "attention": TwigAttention(),
    "twig-text": TwigAttention("text"),
    "random": RandomScores(7),
    "deep:2": BaseLayerAttention(2),
    "deep:1": BaseLayerAttention(1),
    "deep:4": BaseLayerAttention(4),
    "deep:6": BaseLayerAttention(6),
    "deep:2-4": BaseLayerAttention(2, through=4),
}


def grown(attention="sdpa", final_wipe=5, final_share=0.0):
    config = TwigConfig(2, 2, final_wipe=final_wipe, final_share=final_share, pruning_head=True)
    return TwigVLM.grow(tiny_llava(attention=attention), config)


@pytest.mark.parametrize(("attention", "seeds"), [("sdpa", 2), ("eager", 1)])
def test_every_variant_answers_as_generate_does(attention, seeds):
    model = grown(attention)
    variants = make_variants(model, list(SCORERS), [10, 7], [4, 6], [0.5])
    assert len(variants) == 1 + len(SCORERS) * 2 * 2
    different = 0
    for seed in range(seeds):
        inputs = prompt(seed)
        length = inputs["input_ids"].shape[1]
        # a token that occurs, so that some rows of a batch end before others
        end = int(model.generate(**inputs, max_new_tokens=4)[0, -1])
        model.model.generation_config.eos_token_id = [end, 98]
        outcomes = answer_all(model, inputs, variants, 7, seed=7)
        assert outcomes.keys() == {variant.name for variant in variants}
        for variant in variants:
            options = {}
            if variant.retain is not None:
                scorer = SCORERS[variant.method]
                options = {"retain": variant.retain, "final_wipe": variant.final_wipe, "scorer": scorer}
                options["final_share"] = variant.final_share
                if variant.method.endswith("refocus:0.9"):
                    options |= {"refocus": 0.9, "diverse": variant.method.startswith("diverse")}
            one = model.generate(**inputs, **options, max_new_tokens=7, return_dict_in_generate=True)
            assert outcomes[variant.name].ids == one.sequences[0, length:].tolist(), variant
            assert outcomes[variant.name].ran == sum(look.ran for look in (one.looks or [[]])[0])
            assert outcomes[variant.name].looks == (None if one.looks is None else len(one.looks[0]))
            assert outcomes[variant.name].steps == len(one.accepted_lengths[0]) - 1
            assert outcomes[variant.name].kept == (VISUAL if variant is NONE else len(one.kept_indices[0]))
        different += len({tuple(outcome.ids) for outcome in outcomes.values()})
        model.model.generation_config.eos_token_id = None
    assert different > 4 * seeds  # the prunings do differ


def test_what_the_base_s_generation_config_forbids_is_forbidden():
    model, inputs = grown(), prompt()
    before = answer_all(model, inputs, make_variants(model, ["twig"], [10]), 7)
    model.model.generation_config.suppress_tokens = [outcome.ids[0] for outcome in before.values()]
    outcomes = answer_all(model, inputs, make_variants(model, ["twig"], [10]), 7)
    for name, options in (("none", {}), ("twig@10/5", {"retain": 10})):
        expected = model.generate(**inputs, **options, max_new_tokens=7)[0, inputs["input_ids"].shape[1] :].tolist()
        assert outcomes[name].ids == expected != before[name].ids


def test_the_budget_is_the_same_for_every_method():
    model = grown()
    outcomes = answer_all(model, prompt(), make_variants(model, list(SCORERS), [10]), 1)
    # R̄ = (16 * 2 + R * (5 - 2)) / 6 = 10  ->  R = 9.33
    assert {name: outcome.kept for name, outcome in outcomes.items() if name != "none"} == {
        f"{method}@10/5": 9 for method in SCORERS
    }


def test_the_model_is_left_as_it_was():
    model = grown()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer_all(model, prompt(), make_variants(model, ["twig", "deep:6"], [10]), 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("deep:7", "1 to 6"),
        ("deep:0", "1 to 6"),
        ("deep:x", "must be one of"),
        ("deep:2-x", "must be one of"),
        ("deep:2-", "must be one of"),
        ("deep:5-3", "in ascending order"),
        ("deep:²", "refocus:τ, .*deep:N, deep:N-M"),
        ("fastv:²", "'²' is not a layer"),
        ("visionzap", "must be one of"),
        ("cdpruner:3", "takes no layer"),
        ("refocus:x", "must name τ"),
        ("refocus:2", "at most 1"),
    ],
)
def test_unknown_methods_are_refused(method, words):
    with pytest.raises(TwigVLMError, match=words):
        make_variants(grown(), [method], [10])


def test_published_methods_answer_as_generate_does():
    """Whether they look at the vision tower or not, beside rankings by the twig."""
    model, inputs = grown(), prompt()
    methods = ["twig", "random:0", "visionzip", "fastv", "fastervlm", "random"]
    variants = make_variants(model, methods, [10], [5])
    assert [v.name for v in variants] == ["none", "twig@10/5", *(f"{m}@10" for m in methods[1:5]), "random@10/5"]
    outcomes = answer_all(model, inputs, variants, 7, seed=7)
    for method in methods[1:5]:
        pruner = RandomTokens(0, 7) if method == "random:0" else method
        expected = model.generate(**inputs, retain=10, pruner=pruner, max_new_tokens=7, return_dict_in_generate=True)
        assert outcomes[f"{method}@10"].ids == expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert outcomes[f"{method}@10"].kept == len(expected.kept_indices[0])
    expected = answer_all(model, inputs, make_variants(model, ["twig", "random"], [10]), 7, seed=7)
    assert {name: outcomes[name] for name in expected} == expected


def test_impossible_budgets_are_refused():
    model = grown()
    with pytest.raises(TwigVLMError, match="retain=3"):
        answer_all(model, prompt(), [Variant("twig", 3, 5)], 1)
    with pytest.raises(TwigVLMError, match="nothing to compare"):
        make_variants(model, ["none"], [10])


def test_a_twig_s_own_share_is_the_default():
    model = grown(final_share=0.5)
    assert [one.name for one in make_variants(model, ["twig"], [9])] == ["none", "twig@9/5/0.5"]
    several = make_variants(model, ["twig"], [9], [5, 6], [0, 0.5])
    assert [one.name for one in several] == ["none", "twig@9/5", "twig@9/5/0.5", "twig@9/6"]
    own = model.generate(**prompt(), retain=9, max_new_tokens=7)
    assert own.tolist() == model.generate(**prompt(), retain=9, final_share=0.5, max_new_tokens=7).tolist()
    (_, outcome) = answer_all(model, prompt(), make_variants(model, ["twig"], [9]), 7).values()
    assert outcome.ids == own[0, prompt()["input_ids"].shape[1] :].tolist()
    with pytest.raises(TwigVLMError, match="final_share=2: must be 0 to 1"):
        make_variants(model, ["twig"], [9], final_shares=[2])
    with pytest.raises(TwigVLMError, match="final_share: needs a layer after which tokens leave"):
        make_variants(model, ["twig"], [9], [6], [0.5])
    with pytest.raises(TwigVLMError, match="final_share: scout and published methods have their own cuts"):
        make_variants(model, ["fastv"], [9], final_shares=[0.5])


def test_no_final_wipe_is_the_default_of_a_twig_without_one():
    assert [variant.name for variant in make_variants(grown(final_wipe=None), ["twig"], [10])] == ["none", "twig@10/6"]
