"""`twigvlm generate` refuses bad input in one line that names the value, and hides no bug."""

import json
import os
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from twigvlm.cli.main import main


def test_bad_files_of_prompts(refused, arguments, tmp_path, monkeypatch):
    def bad(name, text, *words):
        (tmp_path / name).write_bytes(text)
        refused(*arguments(prompt=None, prompts=tmp_path / name), words=[name, *words])

    bad("empty.txt", b"\n \n", "no prompt")
    bad("latin.txt", "où".encode("latin-1"), "UTF-8")
    bad("a.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2", "not JSON")
    bad("b.jsonl", b'{"text": "a"}', "line 1", "'prompt'")
    bad("c.jsonl", b'{"prompt": "a", "image": 3}', "line 1", "'image'")
    bad("d.jsonl", b"[]", "line 1")
    refused(*arguments(prompt=None, prompts=tmp_path / "none.txt"), words=["none.txt", "no such file"])
    refused(*arguments(prompt=None, prompts=tmp_path), words=["is a directory"])
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    refused(*arguments(prompt=None, prompts=tmp_path / "a.jsonl"), words=["may not be read", "permissions"])


def test_bad_images(refused, arguments, tmp_path):
    refused(*arguments(image=tmp_path / "none.png"), words=["none.png", "no such file"])
    refused(*arguments(image=tmp_path), words=["is a directory"])
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    refused(*arguments(image=corrupt), words=["corrupt.png"])
    animated = tmp_path / "animated.gif"
    Image.new("L", (8, 8)).save(animated, save_all=True, append_images=[Image.new("L", (8, 8), 255)])
    refused(*arguments(image=animated), words=["several frames"])


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
    for option, directory in (("model", base_directory), ("twig", twig_directory)):
        copy = shutil.copytree(directory, tmp_path / option)
        (file,) = copy.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
        refused(*arguments(**{"twig": twig_directory, option: copy}), words=[str(copy)])


def test_missing_weights(refused, arguments, tmp_path, base_directory):
    copy = shutil.copytree(base_directory, tmp_path / "base")
    (file,) = copy.glob("*.safetensors")
    weights = load_file(file)
    lost = [name for name in weights if name.startswith("language_model") and ".layers.3." in name]
    save_file({name: weight for name, weight in weights.items() if name not in lost}, file, {"format": "pt"})
    refused(*arguments(model=copy), words=[str(copy), f"lacks {len(lost)} weights", "download it again"])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("intermediate_size", 64, ["lacks 18 weights", "another size"]),
        ("hidden_size", "abc", ["cannot be loaded", "hidden_size"]),
        ("num_attention_heads", 5, ["cannot be loaded"]),
    ],
)
def test_a_config_that_does_not_fit(refused, arguments, tmp_path, base_directory, option, value, words):
    copy = shutil.copytree(base_directory, tmp_path / "base")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"][option] = value
    (copy / "config.json").write_text(json.dumps(config))
    refused(*arguments(model=copy), words=[str(copy), *words])


def test_weights_that_are_no_pickle(refused, arguments, tmp_path, base_directory):
    copy = shutil.copytree(base_directory, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "pytorch_model.bin").write_bytes(b"garbage")
    refused(*arguments(model=copy), words=[str(copy), "cannot be loaded"])


def test_too_little_memory_is_not_blamed_on_the_model(arguments, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        main(arguments())


def test_twig_of_another_base(refused, arguments, tmp_path):
    from tests.tiny import tiny_llava
    from twigvlm.config import TwigConfig
    from twigvlm.model import TwigVLM

    TwigVLM.grow(tiny_llava(seed=1), TwigConfig(trunk_layers=2, twig_layers=2)).save_pretrained(tmp_path / "other")
    refused(*arguments(twig=tmp_path / "other"), words=["another base"])


def test_unexpected_errors_keep_their_traceback(arguments, monkeypatch):
    def broken(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr("twigvlm.inputs.load_image", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(arguments())
