"""Names of ways to prune: parsed once, and refused before anything is answered."""

import pytest

from tests import families
from tests.tiny import prompt, tiny_llava
from twigvlm.base.families import FAMILIES
from twigvlm.cli.methods import OWN
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.accuracy import run_accuracy
from twigvlm.evaluation.methods import NAMES, Method, parse_method, parse_methods
from twigvlm.evaluation.questions import Question, Questions
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.evaluation.variants import answer_all, generate_options, make_variants
from twigvlm.model import TwigVLM
from twigvlm.pruning.methods import METHODS

POOLING = [family.model_type for family in FAMILIES if family.tower.pools]
PUBLISHED = ["random:0" if name == "random" else name for name in METHODS if name != "fitprune"]
BY_TOWER = ["mustdrop", "visionzip", "fastervlm", "scope", "vispruner", "prunesid", "holov", "prumerge+"]


@pytest.fixture(scope="module")
def model():
    return TwigVLM.grow(tiny_llava(), TwigConfig(2, 2, final_wipe=5, pruning_head=True))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("none", Method("none", "none")),
        ("scout", Method("scout", "twig", scout=True)),
        ("diverse+scout", Method("diverse+scout", "twig", diverse=True, scout=True)),
        ("refocus:0.7", Method("refocus:0.7", "twig", refocus=0.7)),
        ("diverse+refocus:1", Method("diverse+refocus:1", "twig", diverse=True, refocus=1.0)),
        ("random", Method("random", "random")),
        ("random:0", Method("random:0", "published")),
        ("sparsevlm:published:compacted", Method("sparsevlm:published:compacted", "published")),
        ("deep:3", Method("deep:3", "deep", layers=(3, None))),
        ("deep:3-5", Method("deep:3-5", "deep", layers=(3, 5))),
    ],
)
def test_a_name_says_everything(name, method):
    assert parse_method(name) == method
    assert method.needs_twig == (method.ranking not in ("none", "published"))
    assert method.is_random == name.startswith("random")


@pytest.mark.parametrize(
    "name", ["", "diverse+", "diverse:1", "scout+diverse", "diverse+twig", "twig:3", "deep", "diverse+deep:3"]
)
def test_other_names_are_refused(name):
    with pytest.raises(TwigVLMError, match=r"must be one of none, .*diverse\+scout, .*deep:N-M, or published"):
        parse_method(name)


def test_every_name_is_in_the_list_that_the_others_refer_to():
    assert sorted([*NAMES]) == sorted(["none", *(row[0] for row in OWN)])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("twig", {}),
        ("scout", {"scout": True}),
        ("diverse+scout", {"scout": True, "diverse": True}),
        ("diverse+refocus:0.9", {"diverse": True, "refocus": 0.9}),
    ],
)
def test_a_method_answers_alone_as_beside_others(model, name, options):
    (_, variant) = make_variants(model, [name], [9])
    assert (variant.final_wipe is None) == ("scout" in name)
    outcome = answer_all(model, prompt(), [variant], 8)[variant.name]
    start = prompt()["input_ids"].shape[1]
    for given in ({"retain": 9, **options}, generate_options(model, variant)):
        assert outcome.ids == model.generate(**prompt(), **given, max_new_tokens=8)[0, start:].tolist()


def test_methods_without_a_ranking_have_no_scorer(model):
    for name in ("none", "fastv"):
        with pytest.raises(TwigVLMError, match="has no ranking under the twig's cuts; use one"):
            parse_method(name).scorer(model, 0)


@pytest.mark.parametrize("layers", ["0", "7", "5-3", "3-0", "3-7"])
def test_layers_must_be_those_of_the_base_in_order(model, layers):
    with pytest.raises(TwigVLMError, match=f"method 'deep:{layers}': the layers must be 1 to 6"):
        parse_methods(model, [f"deep:{layers}"])


@pytest.mark.parametrize("family", POOLING)
def test_what_a_base_that_pools_patches_cannot_have_is_named_with_what_is_left(family):
    model = TwigVLM.without_twig(families.tiny(family))
    with pytest.raises(TwigVLMError) as caught:
        make_variants(model, PUBLISHED, [20])
    refused, rest = str(caught.value).split(": need the vision tower's attention")
    assert refused.removeprefix("methods=").split() == [name for name in PUBLISHED if name in BY_TOWER]
    left = rest.split("leave them out, and ask for ")[1].split()
    assert left == [name for name in PUBLISHED if name not in BY_TOWER]
    assert [method.name for method in parse_methods(model, left)] == left
    with pytest.raises(TwigVLMError, match=r"methods=visionzip:compacted: need .*; choose divprune, cdpruner or"):
        make_variants(model, ["visionzip:compacted"], [20])


def test_what_is_left_can_be_answered_on_a_base_that_pools_patches():
    base = families.tiny("gemma3")
    model = TwigVLM.without_twig(base)
    variants = make_variants(model, [name for name in PUBLISHED if name not in BY_TOWER], [20])
    outcomes = answer_all(model, families.prompt(base, "gemma3", "images"), variants, 1)
    assert len(outcomes) == 1 + len(PUBLISHED) - len(BY_TOWER)


def test_a_method_that_fails_while_the_first_question_is_answered_is_named(tmp_path):
    base = families.tiny("qwen2_5_vl")
    model, inputs = TwigVLM.without_twig(base), families.prompt(base, "qwen2_5_vl", "images")
    questions = Questions((Question("0", tmp_path, "?", "a", "place"),), "", {})

    def run(*methods):
        visual = int(model.base.visual_mask(inputs["input_ids"]).sum())
        variants = make_variants(model, methods, [visual / 2])
        log = ResultsLog(tmp_path / "results.jsonl", {})
        return run_accuracy(model, None, questions, variants, lambda one: inputs, log, 1, 1)

    with pytest.raises(
        TwigVLMError, match=r"^method 'visionzip:compacted', 'fastervlm:compacted': positions='compacted'"
    ):
        run("fastv", "visionzip:compacted", "fastervlm:compacted")
    with pytest.raises(TwigVLMError, match=r"^positions='compacted': the positions of this base have three axes"):
        run("visionzip:compacted")
