"""What the plug-in of lmms-eval does without lmms-eval: answers, figures, video questions, and saying what is missing."""

import dataclasses
import importlib
import json
import sys
from unittest.mock import Mock

import pytest
from PIL import Image

from tests.tiny import tiny_llava
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.methods import parse_method
from twigvlm.inputs import build_inputs, user_turn
from twigvlm.integrations import lmms_eval
from twigvlm.integrations.lmms_eval import video_qa
from twigvlm.integrations.lmms_eval.answering import Answered, Answerer, Setting, to_square
from twigvlm.integrations.lmms_eval.figures import throughput
from twigvlm.pruning.methods.random import RandomTokens
from twigvlm.pruning.methods.visionzip import VisionZip

GREEDY = {"do_sample": False}
NEW = 6


def question(text="What?", pictures=1):
    return [user_turn(text, [Image.radial_gradient("L").resize((20, 12))] * pictures)]


def expected(model, processor, messages, generate, **options):
    inputs = build_inputs(processor, [messages], model.device, model.dtype)
    ids = generate(**inputs, max_new_tokens=NEW, **GREEDY, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_without_a_method_the_base_answers(model, processor):
    answerer = Answerer(model.base, None, processor, Setting())
    assert answerer.setting.is_base
    (one,) = answerer.answer([question()], NEW, GREEDY)
    assert one.texts == [expected(model, processor, question(), model.model.generate)]
    assert (one.tokens, one.visual, one.average_visual, one.drafted) == ([NEW], [16], [16.0], 0)
    assert 0 < one.first_token < one.seconds


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("twig", {}),
        ("scout", {"scout": True}),
        ("diverse+scout", {"scout": True, "diverse": True}),
        ("diverse", {"diverse": True}),
        ("refocus:0.9", {"refocus": 0.9}),
        ("diverse+refocus:0.9", {"diverse": True, "refocus": 0.9}),
        ("deep:5", {"scorer": ...}),
        ("visionzip", {"pruner": VisionZip()}),
        ("random:0", {"pruner": RandomTokens(0, seed=5)}),
    ],
)
def test_methods_and_drafts_are_those_of_generate(model, processor, monkeypatch, method, options):
    setting = Setting(method, 10, "chain", seed=5, drafting={"draft_threshold": 0.0})
    if "scorer" in options:
        options = {"scorer": parse_method(method).scorer(model, 5)}
    asked = Mock(wraps=model.generate)
    monkeypatch.setattr(model, "generate", asked)
    (one,) = Answerer(model.base, model, processor, setting).answer([question()], NEW, GREEDY)
    given = {name: asked.call_args.kwargs.get(name) for name in ("scout", "diverse", "refocus", "scorer", "pruner")}
    assert {name: value for name, value in given.items() if value} == options
    assert one.texts == [expected(model, processor, question(), model.generate, retain=10, **options)]
    assert one.average_visual == [pytest.approx(10, abs=0.5)]
    assert one.drafted >= one.accepted > 0
    assert one.passes > 0


def test_the_base_s_own_ways_to_draft_repeat_its_answer_and_are_counted(model, processor):
    (plain,) = Answerer(model.base, None, processor, Setting()).answer([question()], NEW, GREEDY)
    small = tiny_llava(1, layers=2)
    for setting, assistant in (
        (Setting(speculate="hf-lookup", drafting={"draft_length": 2, "lookup_ngram": 1}), None),
        (Setting(speculate="draft:small"), small),
    ):
        assert setting.is_base
        answerer = Answerer(model.base, None, processor, setting, assistant=assistant)
        asked = Mock(wraps=model.model.generate)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.model, "generate", asked)
            (one,) = answerer.answer([question()], NEW, GREEDY)
        assert (one.texts, one.tokens, one.visual) == (plain.texts, plain.tokens, plain.visual)
        assert one.drafted >= one.accepted
        assert (one.drafted > 0) == (one.passes > 0)
        assert 0 < one.first_token < one.seconds
        given = asked.call_args.kwargs
        if assistant is None:
            assert (given["prompt_lookup_num_tokens"], given["max_matching_ngram_size"]) == (2, 1)
            assert given["suppress_tokens"] == [model.model.config.image_token_id]
        else:
            assert given["assistant_model"] is small
            assert one.drafted > 0
        with pytest.raises(TwigVLMError, match=r"one prompt at a time, not for 2; give --batch_size 1"):
            answerer.answer([question(), question()], NEW, GREEDY)


def test_a_base_that_transformers_cannot_draft_for_is_named_in_one_line(model, processor):
    headless = model.model.model.language_model
    answerer = Answerer(model.base, None, processor, Setting(speculate="draft:headless"), assistant=headless)
    with pytest.raises(
        TwigVLMError, match=r"speculate=draft:headless: transformers' generate cannot run it on this base"
    ):
        answerer.answer([question()], NEW, GREEDY)


@pytest.mark.parametrize("speculate", ["none", "chain", "lookup"])
def test_passes_are_those_that_verify_drafts(model, processor, speculate):
    (one,) = Answerer(model.base, model, processor, Setting("twig", 10, speculate)).answer([question()], 12, GREEDY)
    inputs = build_inputs(processor, [question()], model.device, model.dtype)
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    (drafted,) = model.generate(**inputs, retain=10, speculate=speculate, **options).drafted_lengths
    assert 0 in drafted
    assert one.passes == sum(count > 0 for count in drafted)
    assert (one.passes > 0) == (speculate != "none")


def test_what_refocusing_runs_again_is_counted(model, processor):
    answer = Answerer(model.base, model, processor, Setting("refocus:0.99", 8)).answer
    (one,) = answer([question()], 12, GREEDY)
    inputs = build_inputs(processor, [question()], model.device, model.dtype)
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, **GREEDY}
    (looks,) = model.generate(**inputs, retain=8, refocus=0.99, **options).looks
    assert one.visual_again == [sum(look.ran for look in looks)]
    assert one.visual_again > [0]
    (plain,) = Answerer(model.base, model, processor, Setting("twig", 8)).answer([question()], 12, GREEDY)
    assert plain.visual_again is None


def test_k_f_and_a_share_of_the_visual_tokens(model, processor):
    setting = Setting("twig", "50%", final_wipe=4)
    (one,) = Answerer(model.base, model, processor, setting).answer([question()], NEW, GREEDY)
    assert one.texts == [expected(model, processor, question(), model.generate, retain=8, final_wipe=4)]


def test_prompts_below_the_budget_are_not_pruned_and_are_answered_apart(model, processor):
    answerer = Answerer(model.base, model, processor, Setting("twig", 20))
    asked = [question(), question("Two?", 2), question("None?", 0)]
    answered = answerer.answer(asked, NEW, GREEDY)
    assert [one.visual for one in answered] == [[16], [32], [0]]
    assert [one.average_visual[0] for one in answered] == [16, pytest.approx(20, abs=0.5), 0]
    together = Answerer(model.base, model, processor, Setting("twig", 10)).answer(
        [question(), question("Why?")], NEW, GREEDY
    )
    assert [len(one.texts) for one in together] == [2]
    assert together[0].texts[0] == expected(model, processor, question(), model.generate, retain=10)


def test_padding_and_a_system_sentence_change_the_prompt(model, processor):
    plain = Answerer(model.base, None, processor, Setting())
    padded = Answerer(model.base, None, processor, Setting(), pad=True, system="Be brief.")
    prepared = padded._prepare(question())
    assert [message["role"] for message in prepared] == ["system", "user"]
    assert prepared[1]["content"][0]["image"].size == (20, 20)
    (short,), (longer,) = (one.answer([question()], NEW, GREEDY) for one in (plain, padded))
    assert longer.prompt_tokens[0] > short.prompt_tokens[0]


def test_squares_have_the_picture_in_their_middle():
    square = to_square(Image.new("RGB", (4, 2), "white"), [10, 20, 30])
    assert square.size == (4, 4)
    column = [square.getpixel((0, y)) for y in range(4)]
    assert column == [(10, 20, 30), (255,) * 3, (255,) * 3, (10, 20, 30)]


def test_a_base_without_videos_refuses_one(model, processor):
    messages = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(TwigVLMError, match="takes none"):
        Answerer(model.base, None, processor, Setting()).answer([messages], NEW, GREEDY)


@pytest.mark.parametrize(
    ("setting", "needs"),
    [
        (Setting(speculate="lookup"), False),
        (Setting(speculate="hf-lookup"), False),
        (Setting(speculate="draft:org/small"), False),
        (Setting("fastv", 10, "exit"), False),
        (Setting("fastv", 10, "chain"), True),
        (Setting("twig", 10), True),
    ],
)
def test_a_twig_is_needed_by_what_ranks_or_drafts_by_it(setting, needs):
    assert setting.needs_twig == needs


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"method": "twig"}, "go together"),
        ({"retain": 10}, "go together"),
        ({"method": "twig", "retain": "many"}, "share such as"),
        ({"method": "twig", "retain": "130%"}, "share such as"),
        ({"method": "twig", "retain": -3}, "share such as"),
        ({"method": "visionzip", "retain": 10, "final_wipe": 4}, "does not apply"),
        ({"speculate": "sometimes"}, "must be one of none, chain, .*, hf-lookup, or draft:MODEL"),
        (
            {"speculate": "hf-lookup", "method": "twig", "retain": 10},
            "which prunes nothing; leave out method and retain",
        ),
        (
            {"speculate": "draft:small", "method": "fastv", "retain": 10},
            "which prunes nothing; leave out method and retain",
        ),
        ({"speculate": "draft:"}, "names no model"),
        (
            {"speculate": "draft:small", "drafting": {"draft_length": 3}},
            "draft_length: does not apply to speculate=draft:",
        ),
        ({"speculate": "hf-lookup", "drafting": {"tree_width": 3}}, "tree_width=3: does not apply"),
        ({"speculate": "chain", "drafting": {"colour": 1}}, "colour: is unknown"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, words):
    with pytest.raises(TwigVLMError, match=words):
        Setting(**setting)


def test_an_unknown_method_is_refused_before_any_question(model, processor):
    with pytest.raises(TwigVLMError, match="must be one of"):
        Answerer(model.base, model, processor, Setting("magic", 10))


def test_figures():
    one = Answered(["a"], [10], [30], [16], [8.0], 2.0, 0.5, 6, 3, 6)
    two = Answered(["b", "c"], [10, 20], [30, 30], [16, 32], [8.0, 12.0], 5.0, 1.5, 4, 2, 4)
    assert throughput([one, two], 2**31) == {
        "num_requests": 3,
        "answer_speed": pytest.approx((5 + 2 + 4) / 3),
        "prompt_visual_tokens": pytest.approx(64 / 3),
        "visual_tokens": pytest.approx(28 / 3),
        "first_token_ms": 1000.0,
        "accepted_per_pass": 0.5,
        "token_acceptance": 0.5,
        "peak_gib": 2.0,
    }
    refocusing = dataclasses.replace(two, visual_again=[6, 3])
    assert throughput([refocusing], None)["visual_tokens_again"] == 4.5
    bare = Answered(["a"], [10], [30], [16], [16.0], 2.0, None, 0, 0, 0)
    assert throughput([bare], None).keys() == {"num_requests", "answer_speed", "prompt_visual_tokens", "visual_tokens"}


def test_without_lmms_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "twigvlm.integrations.lmms_eval.model", raising=False)
    for attempt in (lmms_eval.manifest, lambda: importlib.import_module("twigvlm.integrations.lmms_eval.model")):
        with pytest.raises(TwigVLMError, match=r"pip install 'twigvlm\[lmms-eval\]'"):
            attempt()


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """A folder as Video-LLaVA's evaluation lays it out, and what the task's file says of it."""
    questions = [{"video_name": f"v{n}", "question_id": f"v_{n}", "question": f"Who is {n}?"} for n in range(2)]
    answers = [{"question_id": f"v_{n}", "answer": "a man", "type": 1} for n in range(2)]
    place = json.loads((lmms_eval.TASKS / "tgif.json").read_text())
    (tmp_path / place["videos"]).mkdir(parents=True)
    for name, rows in (("questions", questions), ("answers", answers)):
        (tmp_path / place[name]).write_text(json.dumps(rows))
    for n in range(2):
        (tmp_path / place["videos"] / f"v{n}.mp4").touch()
    monkeypatch.setenv(video_qa.FOLDER, str(tmp_path))
    return tmp_path, place


def test_video_questions_come_with_answers_and_files(videos):
    folder, place = videos
    rows = list(video_qa.load([place]))
    assert [row["question"] for row in rows] == ["Who is 0?", "Who is 1?"]
    assert [row["answer"] for row in rows] == ["a man"] * 2
    assert video_qa.video(rows[1]) == [str(folder / place["videos"] / "v1.mp4")]


def test_what_a_folder_of_videos_lacks_is_named(videos, monkeypatch):
    folder, place = videos
    (folder / place["videos"] / "v1.mp4").unlink()
    with pytest.raises(TwigVLMError, match=r"lacks 1 of the videos .* v1"):
        video_qa.load([place])
    (folder / place["answers"]).write_text("[]")
    with pytest.raises(TwigVLMError, match="other questions"):
        video_qa.load([place])
    (folder / place["answers"]).unlink()
    with pytest.raises(TwigVLMError, match="cannot be read"):
        video_qa.load([place])
    monkeypatch.delenv(video_qa.FOLDER)
    with pytest.raises(TwigVLMError, match="is not set"):
        video_qa.load([place])


@pytest.mark.parametrize(("answer", "right"), [("It is A man.", 1.0), ("a mango", 0.0), ("man a", 0.0)])
def test_an_answer_counts_if_it_contains_the_words(answer, right):
    assert video_qa.contained({"answer": "a man"}, [answer]) == {"contained": right}
