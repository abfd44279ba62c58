import dataclasses
import re

import pytest

from tests.evaluation.conftest import inputs_of
from tests.tiny import prompt
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation import speed
from twigvlm.evaluation.results_log import ResultsLog
from twigvlm.evaluation.speed import check_attentions, in_turn, measure, run_speed
from twigvlm.evaluation.summary import compare_speeds
from twigvlm.evaluation.systems import System, draft_systems, drafting_ways, named_systems
from twigvlm.evaluation.variants import answer_all, make_variants
from twigvlm.model import TwigVLM


def record_answer(record, questions):
    return next(question.answer.lower() for question in questions.items if question.id == record["id"])


def first(questions, count):
    return dataclasses.replace(questions, items=questions.items[:count])


WAYS = drafting_ways({"draft_length": 4, "draft_threshold": 0.0}, {"tree_depth": 3, "tree_nodes": 12}, 2)


def test_measures_every_system(model, tokenizer, questions, tmp_path):
    systems = named_systems((), 10, WAYS, ["sdpa", "eager"])
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
        for way in ("chain", "tree", "auto", "lookup"):
            assert runs[f"twig + {way}"]["ids"] == runs["twig"]["ids"]
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
    systems = named_systems(["refocus:1", "refocus:1 + chain"], 10, WAYS, ["sdpa"])
    results_log = ResultsLog(tmp_path / "results.jsonl", {})
    (record,) = run_speed(model, tokenizer, first(questions, 1), systems, inputs_of, results_log, 12, 8, 1)
    runs = record["runs"]
    assert runs["HF generate, sdpa"]["looks"] is None
    output = model.generate(**prompt(0), retain=10, refocus=1.0, max_new_tokens=12, return_dict_in_generate=True)
    looks = [[look.after, look.ran] for look in output.looks[0]]
    assert looks
    assert runs["refocus:1"]["looks"] == runs["refocus:1 + chain"]["looks"] == looks
    figures = {one.name: one for one in compare_speeds([record], "HF generate, sdpa", dict.fromkeys(runs))}
    alone, drafted = figures["refocus:1"], figures["refocus:1 + chain"]
    assert alone.ran == drafted.ran == sum(ran for _, ran in looks)
    assert alone.again == len(looks) / 11
    assert drafted.again > alone.again, "drafts need fewer steps"


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


def test_the_vision_tower_keeps_an_attention_of_its_own(model):
    tower = model.model.model.vision_tower
    tower.set_attn_implementation("eager")
    check_attentions(model.model, ["eager", "sdpa"])
    assert (tower.config._attn_implementation, model.base.attention) == ("eager", "sdpa")


def test_drafts_are_compared_on_the_same_pruning():
    systems = draft_systems("fastv", 10, (3, 5), (0.3, 0.6))
    assert [one.name for one in systems] == ["fastv", "δ=3 θ=0.3", "δ=3 θ=0.6", "δ=5 θ=0.3", "δ=5 θ=0.6"]
    assert {one.method for one in systems} == {"fastv"}
    assert {one.options["retain"] for one in systems} == {10}
    assert {one.same_as for one in systems[1:]} == {"fastv"}
    assert systems[3].options == {"retain": 10, "speculate": "chain", "draft_length": 5, "draft_threshold": 0.3}


def test_systems_can_be_chosen_and_bring_what_they_are_compared_to():
    systems = named_systems(["chain", "diverse+refocus:0.7 + auto", "chain"], 10, WAYS, ["sdpa"])
    names = [system.name for system in systems]
    refocused = ["diverse+refocus:0.7", "diverse+refocus:0.7 + auto"]
    assert names == ["HF generate, sdpa", "own loop", "chain", *refocused]
    assert [system.same_as for system in systems] == [None, None, "own loop", None, refocused[0]]


@pytest.mark.parametrize("name", ["prunning", "prunning + chain", "twig + chian", "none", "none + chain", "refocus"])
def test_unknown_systems_are_refused_by_name(name):
    with pytest.raises(TwigVLMError, match=f"system {re.escape(repr(name))}: .*'twig \\+ chain'"):
        named_systems([name], 10, WAYS, ["sdpa"])


@pytest.mark.parametrize("method", ["fastv", "divprune", "diverse", "scout", "diverse+refocus:0.7"])
def test_any_method_is_timed_with_drafts_that_change_nothing(method, base, tokenizer, questions, tmp_path):
    model = TwigVLM.grow(base, TwigConfig(2, 2, final_wipe=5, pruning_head=True))
    systems = named_systems([f"{method} + chain", f"{method} + lookup"], 10, WAYS, ["sdpa"])
    log = ResultsLog(tmp_path / "results.jsonl", {})
    (record,) = run_speed(model, tokenizer, first(questions, 1), systems, inputs_of, log, 8, 8, 1)
    runs = record["runs"]
    assert runs[f"{method} + chain"]["ids"] == runs[f"{method} + lookup"]["ids"] == runs[method]["ids"]
    (variant,) = [one for one in make_variants(model, [method], [10]) if one.retain == 10]
    outcome = answer_all(model, inputs_of(questions.items[0]), [variant], 8)[variant.name]
    assert runs[method]["ids"] == outcome.ids


def test_only_the_parts_that_need_a_twig_ask_for_one():
    names = ["own loop", "lookup", "exit", "fastv", "fastv + lookup", "HF prompt lookup"]
    assert not any(system.needs_twig for system in named_systems(names, 10, WAYS, ["sdpa"]))
    needing = ["chain", "twig", "diverse+refocus:0.7", "scout", "deep:3", "fastv + tree", "twig + lookup"]
    systems = {system.name: system for system in named_systems(needing, 10, WAYS, ["sdpa"])}
    assert all(systems[name].needs_twig for name in needing)
