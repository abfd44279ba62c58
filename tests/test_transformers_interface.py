"""A TwigVLM where transformers, and those who know it, expect one of its models."""

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, pipeline

from tests.test_loading import place_of_parts
from tests.tiny import prompt, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm import TwigConfig, TwigVLM

TURN = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": Image.new("RGB", (16, 16), "red")},
            {"type": "text", "text": "what is it?"},
        ],
    }
]


@pytest.fixture
def model():
    return TwigVLM.grow(tiny_llava(context=256), TwigConfig(2, 2))


def test_it_has_what_its_base_has(model):
    base = model.model
    assert model.config is base.config
    assert model.twig.config == TwigConfig(2, 2)
    assert model.generation_config is base.generation_config
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert (model.input_modalities, model.output_modalities) == (base.input_modalities, base.output_modalities)
    assert model.can_generate()
    assert not hasattr(model, "hf_device_map")


def test_another_generation_config_is_the_base_s(model):
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    with model.disabled():
        alone = model.generate(**prompt())
    assert alone.shape[1] == prompt()["input_ids"].shape[1] + 3
    assert torch.equal(model.generate(**prompt(), speculate="chain"), alone)


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # of parameters
def test_a_base_that_lies_in_several_places_says_where(tmp_path):
    from accelerate import dispatch_model

    base = tiny_llava()
    dispatch_model(base, place_of_parts(base, ["disk"] * 6, "cpu", "disk"), offload_dir=tmp_path)
    model = TwigVLM.grow(base, TwigConfig(2, 2))
    assert model.hf_device_map == base.hf_device_map
    assert model.device == torch.device("cpu")


def test_parameters_are_counted(model, capsys):
    twig = sum(parameter.numel() for parameter in model.twig.parameters())
    base = model.model.num_parameters()
    assert model.num_parameters() == base + twig
    assert model.num_parameters(only_trainable=True) == twig
    embeddings = base - model.model.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(exclude_embeddings=True) == base + twig - embeddings
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {twig:,} || all params: {base + twig:,} || trainable%: {100 * twig / (base + twig):.4f}\n"
    )


def ask(model, **options):
    pipe = pipeline("image-text-to-text", model=model, processor=tiny_processor())
    return pipe(text=TURN, max_new_tokens=8, return_full_text=False, generate_kwargs=options)[0]["generated_text"]


def test_a_pipeline_answers_with_the_twig(model):
    expected = ask(model.model)
    assert expected
    assert ask(model, speculate="chain", draft_threshold=0.0) == expected
    assert ask(model, keep=16, final_wipe=6) == expected
    with model.disabled():
        assert ask(model) == expected


def test_a_pipeline_shows_itself(model):
    assert "image" in repr(pipeline("image-text-to-text", model=model, processor=tiny_processor()))
