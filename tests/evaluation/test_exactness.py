import pytest

from tests.evaluation.conftest import inputs_of
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.exactness import CHECKS, choose_checks, run_exactness
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.model import TwigVLM


@pytest.fixture
def check(base, questions, tmp_path):
    def run(change=lambda model: None, limit=None, checks=()):
        def grow():
            model = TwigVLM.grow(base, TwigConfig(2, 2, final_wipe=5))
            change(model)
            return model

        steps = []
        results_log = ResultsLog(tmp_path / "results.jsonl", {})
        chosen = questions.chosen(limit=limit).items
        records = run_exactness(
            base, grow, chosen, inputs_of, results_log, 10, choose_checks(checks), 6, 9, steps.append
        )
        return records, len(steps)

    return run


def test_a_sound_model_passes_and_a_run_goes_on(check):
    some, steps = check(limit=2)
    assert steps == 4
    records, steps = check()
    assert steps == 6  # two that are asked, and all records
    assert records[:2] == some
    assert [record["tokens"] for record in records] == [6, 6, 6, 9]
    assert [record["same"] for record in records] == [dict.fromkeys(CHECKS, True)] * 4


def test_a_changed_base_is_noticed_by_its_bits(check):
    def nudge(model):
        model.base.norm.weight.data[0] *= 1 + 1e-6

    records, _ = check(nudge, limit=1)
    assert records[0]["same"]["disabled"] is False


@pytest.mark.parametrize("way", ["chain", "tree", "auto"])
def test_a_wrong_speculation_is_noticed(check, way):
    def break_speculation(model):
        generate = model.generate

        def broken(**options):
            output = generate(**options)
            if options.get("speculate") == way:
                output = output.clone()
                output[0, -1] += 1
            return output

        object.__setattr__(model, "generate", broken)

    records, _ = check(break_speculation, limit=1)
    assert [name for name, same in records[0]["same"].items() if not same] == [f"pruned {way}", way]


def test_checks_can_be_chosen(check):
    records, _ = check(limit=1, checks=("disabled", "pruned chain"))
    assert list(records[0]["same"].items()) == [("pruned chain", True), ("disabled", True)]
    with pytest.raises(TwigVLMError, match="check 'chian': must be one of pruned chain"):
        choose_checks(["chian"])


def test_the_base_is_asked_only_by_checks_that_compare_with_it(check, base, monkeypatch):
    generate = base.generate
    # it needs the twig's loop each time, never a loop of its own
    monkeypatch.setattr(
        base, "generate", lambda *, custom_generate, **options: generate(custom_generate=custom_generate, **options)
    )
    records, steps = check(limit=1, checks=("pruned chain",))
    assert steps == 2
    assert records[0]["tokens"] == 6
    assert records[0]["same"] == {"pruned chain": True}
