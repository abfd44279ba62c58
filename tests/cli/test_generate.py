import base64
import json

import pytest
import torch
from PIL import Image

from tests.tiny import VISUAL
from twigvlm.cli.main import main

KEYS = {
    "text", "num_tokens", "tokens_per_second", "prefill_ms", "decode_ms", "draft_ms", "verify_ms", "visual_tokens",
    "kept_tokens", "kept_indices", "token_ids", "drafted_lengths", "accepted_lengths", "model", "twig", "dtype", "device",
    "retain", "speculate",
}  # fmt: skip


@pytest.fixture
def arguments(picture, base_directory):
    basic = {"image": picture, "prompt": "What is it?", "model": base_directory, "dtype": "float32", "device": "cpu"}

    def build(**changes):
        options = {**basic, "max-new-tokens": 12, **changes}
        return ["generate", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]

    return build


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
    assert ask(capsys, arguments(**drawn, twig=twig_directory, speculate="tree"))["token_ids"] == plain["token_ids"]
    assert ask(capsys, arguments(**{**drawn, "seed": 5}))["token_ids"] != plain["token_ids"]
    refused(*arguments(temperature=0), words=["temperature=0"])
    refused(*arguments(**{"temperature": 1, "top-p": 1.5}), words=["top_p=1.5"])
    refused(*arguments(**{"top-p": 0.5}), words=["top_p=0.5", "--temperature"])
    refused(*arguments(seed=1), words=["seed=1", "--temperature"])
    refused(*arguments(temperature=1, seed=2**63), words=[f"seed={2**63}"])


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


def test_bad_images(refused, arguments, tmp_path):
    refused(*arguments(image=tmp_path / "none.png"), words=["none.png", "no such file"])
    refused(*arguments(image=tmp_path), words=["is a directory"])
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    refused(*arguments(image=corrupt), words=["corrupt.png"])
    animated = tmp_path / "animated.gif"
    Image.new("L", (8, 8)).save(animated, save_all=True, append_images=[Image.new("L", (8, 8), 255)])
    refused(*arguments(image=animated), words=["2 frames"])


def test_a_data_uri_is_a_picture_and_an_address_is_not(refused, capsys, arguments, picture):
    given = base64.b64encode(picture.read_bytes()).decode()
    answer = ask(capsys, arguments(image=f"data:image/png;base64,{given}"))
    assert answer["token_ids"] == ask(capsys, arguments())["token_ids"]
    refused(*arguments(image="https://example.org/cat.jpg"), words=["'https://example.org/cat.jpg'", "download"])
    refused(*arguments(image="data:image/png;base64," + "A" * 6000), words=["data:image/png", "not an image"])


def test_bad_requests(refused, arguments, twig_directory):
    refused(*arguments(prompt=" "), words=["prompt ' '", "empty"])
    refused(*arguments(prompt="Is <image> good?"), words=["'<image>'", "leave it out"])
    refused(*arguments(**{"max-new-tokens": 0}), words=["max_new_tokens=0"])
    refused(*arguments(**{"max-new-tokens": 0}, twig=twig_directory), words=["max_new_tokens=0"])
    refused(*arguments(**{"max-new-tokens": 100}), words=["max_new_tokens=100", "context of 128"])
    refused(*arguments(prompt="x" * 200, twig=twig_directory), words=["context of 128", "shorten"])


@pytest.mark.parametrize("retain", ["1", "0", "-3", "17", "nan", "inf"])
def test_impossible_budgets(refused, arguments, twig_directory, retain):
    refused(*arguments(twig=twig_directory, retain=retain), words=["retain"])


def test_options_that_do_not_apply(refused, arguments, twig_directory):
    refused(*arguments(retain=8), words=["--retain 8", "--twig DIR"])
    refused(*arguments(speculate="chain"), words=["--speculate chain", "--twig DIR"])
    refused(*arguments(twig=twig_directory, speculate="none"), words=["nothing to do"])


def test_bad_models(refused, arguments, tmp_path, twig_directory):
    refused(*arguments(model=tmp_path), words=[repr(str(tmp_path)), "cannot be loaded"])
    refused(*arguments(model=tmp_path / "none"), words=["cannot be loaded"])
    refused(*arguments(twig=tmp_path), words=[str(tmp_path)])
    refused(*arguments(device="cuda:77"), words=["'cuda:77'", "not available"])
    refused(*arguments(device="toaster"), words=["'toaster'", "not available"])


def test_truncated_weights(refused, arguments, tmp_path, base_directory, twig_directory):
    import shutil

    for option, directory in (("model", base_directory), ("twig", twig_directory)):
        copy = shutil.copytree(directory, tmp_path / option)
        (file,) = copy.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        refused(*arguments(**{"twig": twig_directory, option: copy}), words=[str(copy)])


def test_twig_of_another_base(refused, arguments, tmp_path):
    from tests.tiny import tiny_llava
    from twigvlm.config import TwigConfig
    from twigvlm.model import TwigVLM

    TwigVLM.grow(tiny_llava(seed=1), TwigConfig(trunk_layers=2, twig_layers=2)).save_pretrained(tmp_path / "other")
    refused(*arguments(twig=tmp_path / "other"), words=["another base"])


@pytest.mark.parametrize("words", [[], ["generate"], ["generate", "--dtype", "int3"], ["fly"]])
def test_usage_errors_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


def test_unexpected_errors_keep_their_traceback(arguments, monkeypatch):
    def broken(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr("twigvlm.images.load_image", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(arguments())
