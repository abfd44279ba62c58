"""`twigvlm generate` prints an answer and its figures, for one prompt or for each line of a file."""

import base64
import json
import shutil

import pytest
import torch
from transformers import BatchFeature

from tests.families import IMAGE, VIDEO, prompt, tiny
from tests.tiny import VISUAL
from tests.tiny_processor import tiny_processor
from twigvlm.cli.main import main

KEYS = {
    "text", "num_tokens", "tokens_per_second", "prefill_ms", "decode_ms", "draft_ms", "verify_ms", "visual_tokens",
    "kept_tokens", "kept_indices", "token_ids", "drafted_lengths", "accepted_lengths", "model", "twig", "dtype", "device",
    "average_visual", "looks", "retain", "keep", "final_wipe", "final_share", "retain_per_image", "refocus", "pruner",
    "scout", "diverse", "speculate", "grid", "temperature", "top_p", "seed",
}  # fmt: skip


def ask(capsys, arguments):
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    return json.loads(out)


def test_plain_base(capsys, arguments):
    answer = ask(capsys, arguments())
    assert answer.keys() == KEYS
    assert answer["num_tokens"] == 12
    assert answer["visual_tokens"] == answer["kept_tokens"] == VISUAL
    assert answer["twig"] is None
    assert answer["speculate"] == "none"
    assert answer["accepted_lengths"] is None
    assert answer["dtype"] == "float32"
    seconds = (answer["prefill_ms"] + answer["decode_ms"]) / 1000
    assert answer["tokens_per_second"] == pytest.approx(12 / seconds, rel=1e-3)


def test_beams_of_a_checkpoint_s_config_are_passed_over(capsys, arguments, tmp_path, base_directory, twig_directory):
    copy = shutil.copytree(base_directory, tmp_path / "base")
    config = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**config, "num_beams": 3}))
    for twig in (None, twig_directory):
        for more in ([], ["--json"]):
            outputs = []
            for model in (base_directory, copy):
                assert main([*arguments(model=model, twig=twig), *more]) == 0
                out = capsys.readouterr().out
                outputs.append(json.loads(out)["token_ids"] if more else out)
            assert outputs[0] == outputs[1]


def test_published_methods_need_no_twig(capsys, arguments, twig_directory, refused):
    answer = ask(capsys, arguments(pruner="visionzip", retain=9))
    assert answer.keys() == KEYS
    assert (answer["pruner"], answer["kept_tokens"], answer["average_visual"], answer["twig"]) == (
        "visionzip",
        9,
        9.0,
        None,
    )
    drafted = ask(capsys, arguments(pruner="visionzip", retain=9, twig=twig_directory))
    assert drafted["token_ids"] == answer["token_ids"]
    assert drafted["drafted_lengths"]
    refused(*arguments(pruner="visionzap", retain=9), words=["visionzap", "must be one of"])
    refused(*arguments(pruner="visionzip"), words=["needs a budget"])
    refused(*arguments(pruner="twig", retain=9), words=["--retain 9: needs a twig"])


@pytest.mark.parametrize("way", ["lookup", "exit"])
def test_drafts_without_a_twig_change_nothing(capsys, arguments, way):
    answer = ask(capsys, arguments(speculate=way))
    assert (answer["speculate"], answer["twig"]) == (way, None)
    assert answer["token_ids"] == ask(capsys, arguments())["token_ids"]
    assert len(answer["drafted_lengths"]) == len(answer["accepted_lengths"])


def test_speculation_is_the_default_with_a_twig_and_changes_nothing(capsys, arguments, twig_directory):
    plain = ask(capsys, arguments())
    answer = ask(capsys, arguments(twig=twig_directory))
    assert answer.keys() == KEYS
    assert answer["speculate"] == "chain"
    assert answer["text"] == plain["text"]
    assert answer["kept_tokens"] == VISUAL
    assert sum(answer["accepted_lengths"]) <= sum(answer["drafted_lengths"])
    assert answer["prefill_ms"] > 0
    assert answer["draft_ms"] > 0
    assert answer["verify_ms"] > 0


def test_pruning(capsys, arguments, twig_directory):
    plain = ask(capsys, arguments(twig=twig_directory, retain=8, speculate="none"))
    drafted = ask(capsys, arguments(twig=twig_directory, retain=8, speculate="chain"))
    assert plain["retain"] == drafted["retain"] == 8
    # R from R̄ = 8 with M = 16, K = 2, K_f = 5, L = 6: (8 * 6 - 16 * 2) / 3
    assert plain["kept_tokens"] == drafted["kept_tokens"] == round(16 / 3)
    assert plain["kept_indices"] == drafted["kept_indices"]
    assert len(plain["kept_indices"]) == plain["kept_tokens"]
    assert 0 <= min(plain["kept_indices"]) < max(plain["kept_indices"]) < VISUAL
    tree = ask(capsys, arguments(twig=twig_directory, retain=8, speculate="tree"))
    assert tree["speculate"] == "tree"
    assert max(tree["drafted_lengths"]) > max(drafted["drafted_lengths"])
    assert plain["text"] == drafted["text"] == tree["text"]


def test_samples_of_a_seed(refused, capsys, arguments, twig_directory):
    drawn = {"temperature": 1.3, "top-p": 0.95, "seed": 4}
    plain = ask(capsys, arguments(**drawn))
    assert (plain["temperature"], plain["top_p"], plain["seed"]) == (1.3, 0.95, 4)
    assert ask(capsys, arguments(**drawn, twig=twig_directory, speculate="tree"))["token_ids"] == plain["token_ids"]
    assert ask(capsys, arguments(**{**drawn, "seed": 5}))["token_ids"] != plain["token_ids"]
    refused(*arguments(temperature=0), words=["temperature=0"])
    refused(*arguments(**{"temperature": 1, "top-p": 1.5}), words=["top_p=1.5"])
    refused(*arguments(**{"top-p": 0.5}), words=["top_p=0.5", "--temperature"])
    refused(*arguments(seed=1), words=["seed=1", "--temperature"])
    refused(*arguments(temperature=1, seed=2**63), words=[f"seed={2**63}"])


def test_several_images_and_text_alone(capsys, arguments, picture, twig_directory):
    both = ask(capsys, arguments(image=[picture, picture], twig=twig_directory, retain=16))
    assert both["visual_tokens"] == 2 * VISUAL
    assert max(both["kept_indices"]) >= VISUAL
    none = ask(capsys, arguments(image=None))
    assert none["visual_tokens"] == 0
    assert none["text"] != ask(capsys, arguments())["text"]
    accelerated = ask(capsys, arguments(image=None, twig=twig_directory))
    assert accelerated["text"] == none["text"]
    assert sum(accelerated["drafted_lengths"]) > 0


def test_number_of_kept_tokens(refused, capsys, arguments, twig_directory):
    answer = ask(capsys, arguments(twig=twig_directory, keep=4, **{"final-wipe": 4}))
    assert answer["kept_tokens"] == answer["keep"] == 4
    assert answer["retain"] is None
    assert answer["final_wipe"] == 4
    refused(*arguments(twig=twig_directory, keep=4, retain=8), words=["retain=8 and keep=4"])
    refused(*arguments(keep=4), words=["--keep 4", "--twig DIR"])
    refused(*arguments(twig=twig_directory, **{"final-wipe": 4}), words=["final_wipe=4", "needs a budget"])


class VideoProcessor:
    """Stands for a processor of LLaVA-NeXT-Video, and for torchvision, which reads its videos."""

    chat_template, image_token, video_token = "a template", "<image>", "<video>"
    video_processor, image_processor, tokenizer = object(), None, tiny_processor().tokenizer

    def __init__(self, outputs):
        self.outputs, self.given = outputs, None

    def apply_chat_template(self, messages, add_generation_prompt):
        return "".join("<video>" for message in messages for part in message["content"] if part["type"] == "video")

    def __call__(self, **given):
        self.given = given
        return BatchFeature(self.outputs)


def test_a_video_where_the_family_has_one(refused, capsys, arguments, tmp_path, monkeypatch):
    video = tmp_path / "clip.mp4"
    refused(*arguments(image=None, video=video), words=["clip.mp4", "no such file"])
    video.write_bytes(b"frames")
    refused(*arguments(image=None, video=video), words=["clip.mp4", "takes no videos"])
    refused(*arguments(frames=4), words=["frames=4", "--video"])
    refused(*arguments(video=video, frames=0), words=["frames=0"])

    base = tiny("llava_next_video")
    inputs = prompt(base, "llava_next_video", "video")
    processor = VideoProcessor(inputs)
    monkeypatch.setattr("twigvlm.loading.load_base", lambda *_: (base, processor))
    answer = ask(capsys, arguments(image=None, video=video))
    assert processor.given["videos"] == [str(video)]
    assert "num_frames" not in processor.given
    assert answer["visual_tokens"] == int(torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO])).sum())
    ask(capsys, arguments(image=None, video=video, frames=8))
    assert processor.given["num_frames"] == 8


def test_a_file_of_prompts_gets_an_answer_for_each_line(capsys, arguments, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is it?\n\n  Where?\r\n")
    single = [ask(capsys, arguments(prompt=text)) for text in ("What is it?", "Where?")]
    assert main(arguments(prompt=None, prompts=prompts)) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{answer['text']}\n" for answer in single)
    assert [line[:8] for line in err.splitlines()] == ["[1 of 2:", "[2 of 2:"]
    assert main([*arguments(prompt=None, prompts=prompts), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.keys() - KEYS for line in lines] == [{"prompt"}] * 2
    assert [(line["prompt"], line["text"]) for line in lines] == [
        ("What is it?", single[0]["text"]),
        ("Where?", single[1]["text"]),
    ]


def test_a_file_of_prompts_with_pictures_loses_only_what_fails(capsys, arguments, picture, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "What?", "image": picture.name},
        {"prompt": "What?", "image": "none.png"},
        {"prompt": "What?", "image": [picture.name, picture.name]},
        {"prompt": "What?", "image": []},
        {"prompt": "What?"},
    ]
    prompts.write_text("\n".join(map(json.dumps, records)))
    monkeypatch.chdir("/")  # paths are relative to the file
    assert main([*arguments(prompt=None, prompts=prompts), "--json"]) == 2
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer.get("visual_tokens") for answer in answers] == [VISUAL, None, 2 * VISUAL, 0, VISUAL]
    assert answers[1].keys() == {"prompt", "failed"}
    assert "none.png" in answers[1]["failed"]
    (line,) = err.splitlines()
    assert line.startswith("twigvlm: error: prompt 2 of 5: ")


def test_bare_answer_on_stdout_and_figures_on_stderr(capsys, arguments):
    answer = ask(capsys, arguments())
    assert main(arguments()) == 0
    out, err = capsys.readouterr()
    assert out.strip() == answer["text"]
    assert "12 tokens" in err
    assert "16 of 16 visual tokens" in err


def test_bfloat16(capsys, arguments):
    assert ask(capsys, arguments(dtype="bfloat16"))["dtype"] == "bfloat16"


def test_model_loads_quietly_and_the_seed_is_left_alone(capsys, arguments):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ask(capsys, arguments())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_data_uri_is_a_picture_and_an_address_is_not(refused, capsys, arguments, picture):
    given = base64.b64encode(picture.read_bytes()).decode()
    answer = ask(capsys, arguments(image=f"data:image/png;base64,{given}"))
    assert answer["token_ids"] == ask(capsys, arguments())["token_ids"]
    refused(*arguments(image="https://example.org/cat.jpg"), words=["'https://example.org/cat.jpg'", "download"])
    refused(*arguments(image="data:image/png;base64," + "A" * 6000), words=["data:image/png", "not an image"])
