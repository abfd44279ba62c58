"""Bases, processors and twigs that are named rather than passed."""

import pytest
import torch

from tests.tiny import prompt, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.loading import load, load_base


@pytest.fixture
def folder(tmp_path):
    base = tiny_llava()
    base.save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    TwigVLM.grow(base, TwigConfig(2, 2)).save_pretrained(tmp_path / "twig")
    return tmp_path


@pytest.mark.parametrize(("dtype", "found"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_base_and_its_twig(folder, dtype, found):
    base, processor, model = load(str(folder / "base"), folder / "twig", dtype)
    assert (base.dtype, model.twig.norm.weight.dtype, base.training) == (found, found, False)
    assert model.model is base
    assert processor.image_token == tiny_processor().image_token
    inputs = prompt()
    inputs["pixel_values"] = inputs["pixel_values"].to(found)
    answers = [
        one.generate(**inputs, max_new_tokens=3) for one in (model, TwigVLM.from_pretrained(base, folder / "twig"))
    ]
    assert torch.equal(*answers)


def test_a_base_alone(folder):
    assert load(str(folder / "base"), None)[2] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"dtype 'int8': is not a data type for weights; choose float32"),
        ({"dtype": "float64"}, r"dtype 'float64': is not a data type for weights; choose float32"),
        ({"dtype": "float8_e5m2"}, r"dtype 'float8_e5m2': is not a data type for weights; choose float32"),
        ({"device": "cuda:99"}, r"device 'cuda:99': is not available here; choose cpu or auto"),
        ({"device": "nowhere"}, r"device 'nowhere': is not available here"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(folder, options, message):
    with pytest.raises(TwigVLMError, match=message) as caught:
        load_base(str(folder / "base"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "null"),
        ("config.json", '{"model_type": []}'),
        ("generation_config.json", "[]"),
        ("processor_config.json", "[]"),
        ("tokenizer.json", "1"),
        ("tokenizer_config.json", '{"eos_token": 1}'),
        ("model.safetensors", "no weights"),
    ],
)
def test_files_of_other_content_are_refused(folder, file, content):
    (folder / "base" / file).write_text(content)
    with pytest.raises(
        TwigVLMError, match=r"cannot be loaded \(.+\); give 'sapling', a Hugging Face id or a"
    ) as caught:
        load_base(str(folder / "base"))
    assert "\n" not in str(caught.value)


def test_a_name_that_names_nothing(tmp_path):
    with pytest.raises(TwigVLMError, match=r"cannot be loaded .* give 'sapling', a Hugging Face id or a directory"):
        load_base(str(tmp_path / "nothing"))
