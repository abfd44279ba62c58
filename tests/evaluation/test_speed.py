import dataclasses

import pytest

from tests.evaluation.conftest import inputs_of
from tests.tiny import prompt
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation import speed
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.evaluation.speed import check_attentions, in_turn, measure, run_speed
from twigvlm.evaluation.summary import compare_speeds
from twigvlm.evaluation.systems import System, draft_systems, standard_systems
from twigvlm.model import TwigVLM


def record_answer(record, questions):
    return next(question.answer.lower() for question in questions.items if question.id == record["id"])


def first(questions, count):
    return dataclasses.replace(questions, items=questions.items[:count])


CHAIN = {"draft_length": 4, "draft_threshold": 0.0}
TREE = {"tree_depth": 3, "tree_nodes": 12}


def test_measures_every_system(model, tokenizer, questions, tmp_path):
    systems = standard_systems(10, CHAIN, TREE, ["sdpa", "eager"])
    results_log = ResultsLog(tmp_path / "results.jsonl", {})
    records = run_speed(model, tokenizer, first(questions, 2), systems, inputs_of, results_log, 8, 8, 2)
    assert [record["id"] for record in records] == ["0", "1"]
    for record in records:
        runs = record["runs"]
        assert sorted(runs) == sorted(system.name for system in systems)
        assert (
            runs["chain"]["ids"] == runs["tree"]["ids"] == runs["own loop"]["ids"] == runs["HF generate, sdpa"]["ids"]
        )
        for name in ("auto", "lookup", "exit", "HF prompt lookup"):
            assert runs[name]["ids"] == runs["own loop"]["ids"]
        assert runs["pruning + chain"]["ids"] == runs["pruning + tree"]["ids"] == runs["pruning"]["ids"]
        assert runs["pruning + auto"]["ids"] == runs["pruning + lookup"]["ids"] == runs["pruning"]["ids"]
        for name, run in runs.items():
            assert len(run["ids"]) == 8
            assert run["text"] == tokenizer.decode(run["ids"], skip_special_tokens=True).strip()
            assert run["score"] == int(run["text"].lower() == record_answer(record, questions))
            assert len(run["total"]) == 2
            for prefill, total in zip(run["prefill"], run["total"], strict=True):
                assert 0 < prefill < total
            if name.startswith("HF"):
                assert run["draft"] == [None, None]
                assert bool(run["accepted"]) == (name == "HF prompt lookup")
                continue
            for parts in zip(run["prefill"], run["draft"], run["verify"], run["total"], strict=True):
                assert sum(parts[:3]) <= parts[3] * 1.05
            if "auto" not in name and "lookup" not in name:  # which draft only if it pays, or if there is anything
                assert bool(sum(run["drafted"])) == any(way in name for way in ("chain", "tree", "exit"))
    assert sum(records[0]["runs"]["chain"]["accepted"]) > 0


def test_what_ran_again_is_recorded_of_systems_that_refocus(base, tokenizer, questions, tmp_path):
    model = TwigVLM.grow(base, TwigConfig(2, 2, final_wipe=5, pruning_head=True))
    systems = standard_systems(10, CHAIN, TREE, ["sdpa"], ["refocus", "refocus + chain"], refocus=1.0)
    results_log = ResultsLog(tmp_path / "results.jsonl", {})
    (record,) = run_speed(model, tokenizer, first(questions, 1), systems, inputs_of, results_log, 12, 8, 1)
    runs = record["runs"]
    assert runs["HF generate, sdpa"]["looks"] is None
    output = model.generate(**prompt(0), retain=10, refocus=1.0, max_new_tokens=12, return_dict_in_generate=True)
    looks = [[look.after, look.ran] for look in output.looks[0]]
    assert looks
    assert runs["refocus"]["looks"] == runs["refocus + chain"]["looks"] == looks
    figures = {one.name: one for one in compare_speeds([record], "HF generate, sdpa", dict.fromkeys(runs))}
    assert figures["refocus"].ran == figures["refocus + chain"].ran == sum(ran for _, ran in looks)
    assert figures["refocus"].again == len(looks) / 11
    assert figures["refocus + chain"].again > figures["refocus"].again, "drafts need fewer steps"


def test_systems_take_turns_after_a_warm_up(model, tokenizer, questions, tmp_path, monkeypatch):
    order = []
    real = speed.measure
    monkeypatch.setattr(speed, "measure", lambda m, i, c, n, **how: order.append(c.name) or real(m, i, c, n))
    systems = [System("a"), System("b", options={"retain": 10}), System("c")]

    def run(count):
        results_log = ResultsLog(tmp_path / "results.jsonl", {})
        return run_speed(model, tokenizer, first(questions, count), systems, inputs_of, results_log, 2, 2, 2)

    turns = ["".join(one.name for one in in_turn(systems, turn)) for turn in range(4)]
    before = run(1)
    assert "".join(order) == "abc" + turns[0] + turns[1]
    order.clear()
    assert run(2)[:1] == before
    assert "".join(order) == "abc" + turns[2] + turns[3]  # a run that goes on warms up again


def test_nobody_always_follows_the_same_one():
    systems = [System(name) for name in "abcd"]
    orders = [[one.name for one in in_turn(systems, turn)] for turn in range(20)]
    assert orders == [[one.name for one in in_turn(systems, turn)] for turn in range(20)]
    assert all(sorted(order) == list("abcd") for order in orders)
    before = {order[order.index("b") - 1] for order in orders if order[0] != "b"}
    assert before == set("acd")
    assert {order[0] for order in orders} == set("abcd")


def test_attentions_are_checked_and_left_as_they_were(model):
    check_attentions(model.model, ["eager", None, "sdpa"])
    with pytest.raises(TwigVLMError, match="attention 'nonsense': not available here"):
        check_attentions(model.model, ["eager", "nonsense"])
    assert model.base.attention == "sdpa"


def test_memory_is_watched_where_that_is_asked_for(model, tokenizer, questions, tmp_path, monkeypatch):
    held = iter([3000, 2000])
    monkeypatch.setattr(speed.peak_memory, "reset_peak", lambda device: None)
    monkeypatch.setattr(speed.peak_memory, "peak", lambda device: next(held))
    results_log = ResultsLog(tmp_path / "results.jsonl", {})
    systems = [System("a"), System("b")]
    asked = model, tokenizer, first(questions, 1), systems, inputs_of, results_log, 2, 2, 1
    (record,) = run_speed(*asked, memory=True)
    assert {name: run["peak"] for name, run in record["runs"].items()} == {"a": 3000, "b": 2000}
    assert len(record["runs"]["a"]["total"]) == 1


def test_the_attention_of_the_model_is_put_back(model):
    before = model.base.attention
    seen = []
    hook = model.model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args: seen.append(module.config._attn_implementation)
    )
    measure(model, prompt(), System("HF", "eager"), 2)
    hook.remove()
    assert set(seen) == {"eager"}
    assert model.base.attention == before == "sdpa"
    with pytest.raises(ValueError, match="nonsense"):
        measure(model, prompt(), System("HF", "nonsense"), 2)
    assert model.base.attention == "sdpa"


def test_drafts_are_compared_on_the_same_pruning():
    systems = draft_systems(10, (3, 5), (0.3, 0.6))
    assert [one.name for one in systems] == ["pruning", "δ=3 θ=0.3", "δ=3 θ=0.6", "δ=5 θ=0.3", "δ=5 θ=0.6"]
    assert {one.options["retain"] for one in systems} == {10}
    assert {one.same_as for one in systems[1:]} == {"pruning"}
    assert systems[3].options == {"retain": 10, "speculate": "chain", "draft_length": 5, "draft_threshold": 0.3}


def test_systems_can_be_chosen_and_bring_what_they_are_compared_to():
    systems = standard_systems(10, CHAIN, TREE, ["sdpa"], ["pruning + chain"])
    assert [system.name for system in systems] == ["HF generate, sdpa", "pruning", "pruning + chain"]
    with pytest.raises(TwigVLMError, match="system 'prunning': must be one of HF prompt lookup, own loop, pruning"):
        standard_systems(10, CHAIN, TREE, ["sdpa"], ["prunning"])
