"""The plug-in in lmms-eval, through its registry, its evaluator and its command line: `make test-lmms`."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}

from lmms_eval import models
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import Image

from recipes.sapling import questions as sapling_questions
from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm import TwigConfig, TwigVLM, TwigVLMError, sapling
from twigvlm.cli.main import main
from twigvlm.inputs import build_inputs, user_turn
from twigvlm.integrations.lmms_eval import TASKS
from twigvlm.integrations.lmms_eval.model import SYSTEMS, TwigVLMChat

ASKED = 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny base with its processor, and a twig on it."""
    base, twig = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("twig")
    model = tiny_llava(deep_scale=0.03, from_layer=2)
    model.save_pretrained(base)
    tiny_processor().save_pretrained(base)
    TwigVLM.grow(model, TwigConfig(2, 2, final_wipe=5)).save_pretrained(twig)
    return {"pretrained": str(base), "twig": str(twig), "device": "cpu", "dtype": "float32"}


def requests(model, *texts, **options):
    """Requests of a task without a file, as lmms-eval makes them for chat models."""
    model.task_dict["task"] = {"test": list(texts)}

    def messages(text):
        image = {"type": "image", "url": Image.radial_gradient("L").resize((20, 12))}
        return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]

    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    return [
        Instance(
            "generate_until", (text, messages, {"max_new_tokens": 6, **options}, number, "task", "test"), 0, metadata
        )
        for number, text in enumerate(texts)
    ]


def test_lmms_eval_knows_the_model():
    assert models.get_model("twigvlm") is TwigVLMChat


def test_the_tasks_are_found_and_everything_they_name_is_there():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    videos = {f"{name}_qa_1k{judged}" for name in ("tgif", "msvd", "msrvtt") for judged in ("", "_judged")}
    assert set(manager.all_tasks) == {"textvqa_val_ocr", "mmvet_plain"} | videos
    for path in TASKS.glob("*.yaml"):
        config = load_yaml_config(str(path))
        assert callable(config["doc_to_visual"])
        assert callable(config["process_results"])
        if config["dataset_path"] == "json":
            assert Path(config["dataset_kwargs"]["data_files"]["test"]).is_file()
    textvqa = load_yaml_config(str(TASKS / "textvqa_val_ocr.yaml"))
    doc = {"question": "what is it?", "ocr_tokens": ["STOP", "42"]}
    assert textvqa["doc_to_text"](doc, textvqa["lmms_eval_specific_kwargs"]["default"]) == (
        "What is it?\nReference OCR token: STOP, 42\nAnswer the question using a single word or phrase."
    )


def test_answers_keep_their_order_in_batches_of_any_size(bases):
    texts = ["What?", "Who is it?", "Why?"]
    answers = []
    for size in ("1", "2"):
        model = TwigVLMChat(**bases, method="twig", retain=10, speculate="tree", batch_size=size)
        results = model.generate_until(requests(model, *texts))
        assert [result.token_counts.output_tokens for result in results] == [6] * 3
        answers.append([result.text for result in results])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


def test_sampling_is_the_task_s_to_ask_for(bases):
    model = TwigVLMChat(**bases, speculate="chain")
    greedy, again = (model.generate_until(requests(model, "What?", temperature=0.2, do_sample=False)) for _ in range(2))
    assert greedy[0].text == again[0].text
    sampled = [
        model.generate_until(requests(model, "What?", temperature=50.0, do_sample=True))[0].text for _ in range(3)
    ]
    assert len({*sampled, greedy[0].text}) > 2


@pytest.mark.parametrize("speculate", ["lookup", "exit"])
def test_drafts_that_need_no_twig(bases, speculate):
    plain, drafted = (
        TwigVLMChat(**{**bases, "twig": None}, method="fastv", retain=10, speculate=way) for way in ("none", speculate)
    )
    assert (
        drafted.generate_until(requests(drafted, "What?"))[0].text
        == plain.generate_until(requests(plain, "What?"))[0].text
    )


def test_the_base_s_own_ways_to_draft(bases):
    plain = TwigVLMChat(**{**bases, "twig": None})
    (expected,) = plain.generate_until(requests(plain, "What?"))
    for speculate in ("hf-lookup", f"draft:{bases['pretrained']}"):
        model = TwigVLMChat(**{**bases, "twig": None}, speculate=speculate)
        (result,) = model.generate_until(requests(model, "What?"))
        assert (result.text, result.token_counts) == (expected.text, expected.token_counts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "fastv", "retain": 10, "colour": 1}, "colour: is unknown"),
        ({"method": "fastv", "retain": 10, "speculate": "hf-lookup"}, "leave out method and retain"),
        ({"speculate": "hf-lookup", "batch_size": 2}, "give --batch_size 1"),
        ({"speculate": "draft:sapling"}, "assistant 'sapling': has a vocabulary of"),
        ({"batch_size": "auto"}, "must be a number"),
        ({"method": "twig", "retain": 10, "twig": None}, "need a twig"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(bases, arguments, words):
    with pytest.raises(TwigVLMError, match=words):
        TwigVLMChat(**{**bases, **arguments})


def test_a_question_that_cannot_be_asked_is_named(bases):
    model = TwigVLMChat(**bases, method="twig", retain=10)
    with pytest.raises(TwigVLMError, match=r"task task, from question 1 on: .*placeholder"):
        model.generate_until(requests(model, "What?", "An <image> tag?"))
    with pytest.raises(TwigVLMError, match="beam search"):
        model.generate_until(requests(model, "What?", num_beams=3))


def test_the_system_sentences_are_those_of_the_evaluations():
    assert SYSTEMS["vicuna"].startswith(
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
    )
    assert SYSTEMS["llava-v1"].endswith("polite answers to the human's questions.")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a task on Sapling's questions, and these questions."""
    folder = tmp_path_factory.mktemp("sapling")
    shutil.copytree(Path(__file__).parent / "task", folder, dirs_exist_ok=True)
    options = sapling_questions.Options(folder, "validation", ASKED, evaluation=True, descriptions=0)
    sapling_questions.main(options)
    rows = json.loads((folder / "questions.json").read_text())["questions"]
    kept = [{"question": row["question"], "answer": row["answer"], "image": str(folder / row["image"])} for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, kept)))
    return folder, kept


def command(monkeypatch, folder, output, arguments):
    """The command that users give, in this process."""
    from lmms_eval import __main__ as lmms_eval_command

    arguments = f"pretrained=sapling,dtype=float32,device=cpu{arguments}"
    words = [
        "--model",
        "twigvlm",
        "--model_args",
        arguments,
        "--include_path",
        str(folder),
        "--tasks",
        "sapling_questions",
    ]
    words += ["--batch_size", "1", "--log_samples", "--output_path", str(output), "--verbosity", "DEBUG"]
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *words])
    # Reading the files of its own thousand tasks takes longer than the rest.
    monkeypatch.setattr(lmms_eval_command, "TaskManager", partial(TaskManager, include_defaults=False))
    lmms_eval_command.cli_evaluate()
    (file,) = output.rglob("*_results.json")
    (samples,) = output.rglob("*_samples_*.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    return json.loads(file.read_text()), [answer if isinstance(answer, str) else answer[0] for answer in answers]


def test_a_task_of_ours_by_the_command_line_and_the_table(monkeypatch, capsys, task, tmp_path):
    folder, rows = task
    base, _ = command(monkeypatch, folder, tmp_path / "base", "")
    pruned, answers = command(monkeypatch, folder, tmp_path / "r64", ",method=twig,retain=64,speculate=chain")

    hf_model, processor = sapling.load()
    model = TwigVLM.from_pretrained(hf_model.float(), sapling.twig_path())
    for row, answer in zip(rows, answers, strict=True):
        inputs = build_inputs(processor, [[user_turn(row["question"], row["image"])]], model.device, model.dtype)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, retain=64)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer

    assert base["throughput"]["avg_visual_tokens"] == 576
    assert pruned["throughput"]["avg_visual_tokens"] == pytest.approx(64, abs=0.5)
    assert pruned["throughput"]["avg_accepted_per_pass"] > 0
    assert pruned["throughput"]["avg_latency"] > 0
    assert pruned["n-samples"]["sapling_questions"]["effective"] == ASKED
    capsys.readouterr()
    assert main(["evaluate", "relacc", str(tmp_path / "base"), str(tmp_path / "r64")]) == 0
    table = capsys.readouterr().out
    assert "| **R̄ 64** |" in table
    assert "| twig, chain |" in table
