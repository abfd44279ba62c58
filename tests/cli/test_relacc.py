"""`twigvlm evaluate relacc` on result files as lmms-eval 0.7.3 writes them."""

import ast
import json
from pathlib import Path

import pytest

from twigvlm.cli.main import main
from twigvlm.evaluation.benchmarks import BENCHMARKS
from twigvlm.evaluation.relacc import BASE_ARGUMENTS, PROTOCOL
from twigvlm.integrations import lmms_eval
from twigvlm.loading import SAPLING

SCORES = {
    "gqa": {"exact_match": 0.619},
    "mme": {"mme_cognition_score": 362.0, "mme_perception_score": 1500.0},
    "mmbench_en_dev_static": {"gpt_eval_score": 64.7},
}
SPEED = {"total_gen_tokens": 300, "total_elapsed_time": 10.0, "avg_speed": 30.0, "avg_visual_tokens": 576.0}
SPEED |= {"avg_answer_speed": 20.0}


@pytest.fixture
def write(tmp_path):
    """Write a result file, and return its run's folder."""

    def file(
        run, args="pretrained=base", scores=SCORES, samples=1000, throughput=SPEED, date="20261201_100000", **config
    ):
        record = {
            "results": {
                task: {
                    "alias": task,
                    **{f"{name},none": value for name, value in metrics.items()},
                    **{f"{name}_stderr,none": "N/A" for name in metrics},
                    "submission,none": [],
                }
                for task, metrics in scores.items()
            },
            "n-samples": {task: {"original": 5000, "effective": samples} for task in scores},
            "higher_is_better": {
                task: dict.fromkeys(["submission", *metrics], True) for task, metrics in scores.items()
            },
            "config": {"model": "twigvlm", "model_args": args, **config},
            "throughput": throughput,
        }
        folder = tmp_path / run / "org__base"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{date}_results.json").write_text(json.dumps(record))
        return tmp_path / run

    return file


def rows(capsys, *arguments):
    """The printed table: rows of cells, by their first one."""
    assert main(["evaluate", "relacc", *map(str, arguments)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_a_gain_by_batching_is_not_shown_as_a_method_s(capsys, write):
    base, method = write("base", batch_size="1"), "pretrained=base,method=fastv,retain=192"
    found = rows(capsys, base, write("alone", method, batch_size="1"))
    assert found["fastv"][-2:] == ["1.00", "1.00"]
    found = rows(capsys, base, write("eight", method, batch_size="8"))
    assert found["fastv"][-3:] == ["30.0", "–", "–"]


def test_a_run_with_other_lengths_of_answers_is_refused(capsys, write):
    base = write("base", gen_kwargs="")
    run = write("short", "pretrained=base,method=fastv,retain=192", gen_kwargs={"max_new_tokens": 16})
    assert main(["evaluate", "relacc", str(base), str(run)]) == 2
    assert "gen_kwargs=" in capsys.readouterr().err


def test_the_layout_of_table_1(capsys, write):
    base = write("base")
    faster = SPEED | {"total_elapsed_time": 5.0, "avg_answer_speed": 50.0, "avg_visual_tokens": 64.2}
    lower = {
        "gqa": {"exact_match": 0.619 * 0.9},
        "mme": {"mme_cognition_score": 162.0, "mme_perception_score": 1700.0},
        "mmbench_en_dev_static": {"gpt_eval_score": 64.7 * 0.8},
    }
    args = "pretrained=base,twig=twigs/ours,method=twig,retain=64,speculate=chain"
    r64 = write("r64", args, lower, throughput=faster)
    r192 = write("r192", "pretrained=base,method=fastv,retain=192")
    table = rows(capsys, base, r64, r192)
    assert list(table) == ["method", "---", "**base**", "**R̄ 192**", "fastv", "**R̄ 64**", "twig (ours), chain"]
    assert table["method"][:4] == ["GQA · RelAcc", "MMB · RelAcc", "MME · RelAcc", "RelAcc, %"]
    assert table["**base**"] == [
        "61.9 · 100.0",
        "64.7 · 100.0",
        "1862.0 · 100.0",
        "100.0",
        "576.0",
        "30.0",
        "1.00",
        "1.00",
    ]
    assert table["twig (ours), chain"] == [
        "55.7 · 90.0",
        "51.8 · 80.0",
        "1862.0 · 100.0",
        "90.0",
        "64.2",
        "60.0",
        "2.00",
        "2.50",
    ]
    assert list(rows(capsys, base, r64, "--tasks", "gqa")["twig (ours), chain"][:2]) == ["55.7 · 90.0", "90.0"]


def test_runs_of_one_method_are_told_apart(capsys, write):
    common = "pretrained=base,twig=twigs/ours,retain=64"
    given = {"a": "", "b": ",final_wipe=20,final_share=0.1", "c": ",final_wipe=24.0,final_share=0.1,method=twig"}
    runs = [write(name, common + more) for name, more in given.items()]
    table = rows(capsys, write("base"), *runs, write("fastv", "pretrained=base,method=fastv,retain=64"))
    assert list(table)[4:] == [
        "twig (ours)",
        "twig (ours), final_wipe=20, final_share=0.1",
        "twig (ours), final_wipe=24.0, final_share=0.1",
        "fastv",
    ]
    twice = [write(name, common) for name in ("first", "second")]
    assert list(rows(capsys, write("base"), *twice))[4:] == [f"twig (ours), {run}" for run in twice]


def test_the_base_may_be_measured_with_the_faster_attention(capsys, write):
    base = write("base", "pretrained=base,attention=sdpa")
    eager = write("eager", "pretrained=base,attention=eager", throughput=SPEED | {"total_elapsed_time": 20.0})
    run = write("run", "pretrained=base,method=fastv,retain=64")
    table = rows(capsys, base, eager, run)
    assert (table["none"][-2], table["fastv"][-2]) == ("0.50", "1.00")


def test_what_refocusing_runs_again_stands_beside_the_budget(capsys, write):
    run = write(
        "run", "pretrained=base,method=refocus:0.7,retain=64", throughput=SPEED | {"avg_visual_tokens_again": 41.25}
    )
    table = rows(capsys, write("base"), run, write("other", "pretrained=base,method=fastv,retain=64"))
    place = table["method"].index("chosen again")
    assert [table[name][place] for name in ("**base**", "refocus:0.7", "fastv")] == ["–", "41.2", "–"]


def test_the_newest_result_of_each_task_counts_and_times_add_up(capsys, write):
    base = write("base")
    write("run", scores={"gqa": {"exact_match": 0.1}, "mme": SCORES["mme"]}, date="20261201_090000")
    slow = SPEED | {"total_gen_tokens": 100, "total_elapsed_time": 30.0, "avg_visual_tokens": 100.0}
    run = write("run", scores={name: SCORES[name] for name in ("gqa", "mmbench_en_dev_static")}, throughput=slow)
    row = rows(capsys, base, run)["none"]
    assert row[:4] == ["61.9 · 100.0", "64.7 · 100.0", "1862.0 · 100.0", "100.0"]
    assert row[4:] == ["338.0", "10.0", "0.33", "1.00"]  # 400 tokens in 40 s


def test_speeds_on_other_tasks_are_not_compared(capsys, write):
    run = write("run", scores={**SCORES, "scienceqa_img": {"exact_match": 0.7}})
    assert rows(capsys, write("base"), run)["none"][-3:] == ["30.0", "–", "–"]
    bare = write("bare", throughput=None)
    assert rows(capsys, write("base"), bare)["none"][-4:] == ["–", "–", "–", "–"]


def test_an_unknown_task_counts_by_its_first_metric(capsys, write):
    base = write("base", scores={"new": {"score": 3.25}})
    assert rows(capsys, base, write("run", scores={"new": {"score": 1.625}}))["none"][:2] == ["1.625 · 50.0", "50.0"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": {"gqa": {"exact_match": 0.5}}}, ["has no result of mmbench_en_dev_static, mme", "--tasks"]),
        ({"samples": 10}, ["10 questions of gqa", "1000", "--limit"]),
        ({"args": "pretrained=base,pad=true"}, ["pad=true", "pad=false", "one protocol"]),
        ({"scores": {**SCORES, "mme": {"mme_cognition_score": 1.0}}}, ["'mme'", "no score"]),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(refused, write, changes, words):
    refused("evaluate", "relacc", write("base"), write("run", **changes), words=words)


def test_arguments_that_mean_the_same_are_one_protocol(capsys, write):
    """Whether a default is written down or not, and however a number or a truth is."""
    base = write("base", "pretrained=base,dtype=auto,pad=False,max_new_tokens=128")
    first = write("first", "pretrained=base,method=fastv,retain=64,attention=auto,frames=None")
    second = write("second", "pretrained=base,method=visionzip,retain=64.0,pad=false,system=")
    drafted = write("drafted", "pretrained=base,method=None,retain=None,speculate=lookup")
    table = rows(capsys, base, first, second, drafted)
    assert list(table)[3:] == ["**no pruning**", "none, lookup", "**R̄ 64**", "fastv", "visionzip"]


def test_what_is_not_given_is_what_the_model_of_lmms_eval_takes():
    source = (Path(lmms_eval.__file__).parent / "model.py").read_text()
    (init,) = (
        one for one in ast.walk(ast.parse(source)) if isinstance(one, ast.FunctionDef) and one.name == "__init__"
    )
    names = [argument.arg for argument in init.args.args][-len(init.args.defaults) :]
    defaults = {
        name: SAPLING if isinstance(value, ast.Name) else str(ast.literal_eval(value))
        for name, value in zip(names, init.args.defaults, strict=True)
    }
    assert {name: defaults[name].lower() for name in PROTOCOL} == PROTOCOL
    assert {defaults[name].lower() for name in BASE_ARGUMENTS} == {"none"}


@pytest.mark.parametrize("args", ["method=fastv,retain=192", "retain=192,twig=twigs/ours", "speculate=lookup"])
def test_the_first_run_is_the_base_s_own(refused, write, args):
    pruned = write("base", f"pretrained=base,{args}")
    refused("evaluate", "relacc", pruned, write("run"), words=[f"has {args.partition(',')[0]};", "without pruning"])
    assert main(["evaluate", "relacc", str(write("none", "pretrained=base,method=none,twig=x")), str(pruned)]) == 0


def test_files_that_are_none_are_refused(refused, write, tmp_path):
    base = write("base")
    refused("evaluate", "relacc", base, tmp_path / "nowhere.json", words=["nowhere.json", "no result file"])
    (tmp_path / "empty").mkdir()
    refused("evaluate", "relacc", base, tmp_path / "empty", words=["--output_path"])
    (tmp_path / "list.json").write_text("[1]")
    refused("evaluate", "relacc", base, tmp_path / "list.json", words=["no result file"])
    write("base", "pretrained=other", date="20261201_110000")
    refused("evaluate", "relacc", base, base, words=["other model arguments"])


def test_no_run_to_compare_is_refused(refused, write):
    refused("evaluate", "relacc", write("base"), words=["name at least one"])


def test_the_columns_are_those_of_table_1():
    shown = [BENCHMARKS[task].column for task in BENCHMARKS]
    assert [name for name in shown if "(" not in name][:6] == ["GQA", "MMB", "MME", "TextVQA", "SQA-I", "VQAv2"]
