"""Exported drafters: plain decoder layers on the tokens of EAGLE's slots draft what the twig drafts."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import families
from tests.families import TRUNK, TWIG
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.base.token_inputs import slice_tokens
from twigvlm.integrations.vllm import DRAFTER
from twigvlm.integrations.vllm.arithmetic import following_positions
from twigvlm.integrations.vllm.export import drafter_config, drafter_weights, export
from twigvlm.integrations.vllm.ranking import Ranking
from twigvlm.pruning.select import best, diverse

EXPORTED = ("llava", "pixtral", "llava_onevision", "qwen2_5_vl", "qwen3_vl")


def grown(name, **config):
    model = families.tiny(name)
    options = {"pruning_head": True, "draft_vocabulary": 60, **config}
    size, order = options["draft_vocabulary"], torch.Generator().manual_seed(0)
    ids = None if size is None else torch.randperm(families.VOCABULARY, generator=order)[:size].sort().values
    return TwigVLM.grow(model, TwigConfig(TRUNK, TWIG, **options), ids)


def plain_decoder(model, folder):
    """Transformers' own decoder of the base's kind with the exported layers, and nothing of the twig's code."""
    exported = json.loads((folder / "config.json").read_text())
    config = copy.deepcopy(model.base.config)
    for name, value in exported.items():
        if name not in ("architectures", "model_type", "dtype") and hasattr(config, name):
            setattr(config, name, value)
    config.layer_types = ["full_attention"] * exported["num_hidden_layers"]
    decoder = type(model.base.decoder)(config).eval()
    weights = load_file(folder / "model.safetensors")
    own = {name: tensor for name, tensor in weights.items() if name.startswith(("layers.", "norm."))}
    loaded = decoder.load_state_dict(own, strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == ["embed_tokens.weight"]
    return decoder, weights


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_plain_layers_on_the_slots_draft_what_the_twig_drafts(tmp_path, name):
    model = grown(name)
    inputs = families.prompt(model.model, name, "images")
    prompt, base, twig = model.base.prompt(**inputs), model.base, model.twig
    count = prompt.hidden.shape[1]
    # The twig without the first token, which EAGLE's slots leave out.
    per_token, masks = slice_tokens(base.token_inputs(prompt), 1, count), base.masks()
    hidden = base.run_layers(prompt.hidden[:, 1:], 0, TRUNK, per_token, masks)
    expected = twig.logits(twig(hidden, per_token, masks))[0]

    decoder, weights = plain_decoder(model, export(model, tmp_path))
    slots = prompt.position_ids[..., :-1]
    options = {}
    if slots.ndim == 3:  # M-RoPE
        slots = following_positions(slots[-3:, 0], torch.tensor([0, count - 1]))[:, None]
        if prompt.deepstack:
            visual = prompt.visual_mask[:, 1:]
            options = {
                "visual_pos_masks": visual,
                "deepstack_visual_embeds": [level[:, 1:][visual] for level in prompt.deepstack[:TRUNK]],
            }
    states = decoder(inputs_embeds=prompt.hidden[:, 1:], position_ids=slots, **options).last_hidden_state[0]
    logits = states @ weights["lm_head.weight"].T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    drafted = logits.argmax(dim=-1)
    assert torch.equal(drafted + weights["d2t"][drafted], twig.draft_token_ids[expected.argmax(dim=-1)])


@pytest.mark.parametrize("name", EXPORTED)
def test_both_model_runners_find_what_they_look_for(name):
    model = grown(name)
    config, weights = drafter_config(model), drafter_weights(model)
    assert config["architectures"] == [DRAFTER]
    assert config["num_hidden_layers"] == TRUNK + TWIG
    assert config["eagle_config"] == {"use_aux_hidden_state": False}
    assert config["eagle_aux_hidden_state_layer_ids"] == [TRUNK]
    assert config["draft_vocab_size"] == 60
    assert config["vocab_size"] == families.VOCABULARY
    assert config["twigvlm"]["base"]["num_hidden_layers"] == families.LAYERS
    biased = "layers.0.self_attn.q_proj.bias" in weights
    assert config["qkv_bias"] == biased == (name in ("llava_onevision", "qwen2_5_vl"))
    assert not config["attention_bias"]
    assert config["model_type"] == ("qwen3" if name == "qwen3_vl" else "llama")
    assert ("mrope_section" in config["rope_parameters"]) == name.startswith("qwen")
    assert {name for name in weights if name.startswith("pruning_head.")}
    assert not any(tensor.requires_grad for tensor in weights.values())


@pytest.mark.parametrize(
    ("config", "has_head", "vocabulary"),
    [
        ({"draft_vocabulary": None, "head": "shared"}, False, 100),
        ({"draft_vocabulary": None}, True, 100),
        ({"head": "shared"}, True, 60),
        ({"draft_vocabulary": 100}, True, 100),
    ],
)
def test_a_head_that_is_the_base_s_is_not_copied(config, has_head, vocabulary):
    model = grown("llava", **config)
    weights = drafter_weights(model)
    mapped = config.get("draft_vocabulary", 60) is not None
    assert ("lm_head.weight" in weights) == has_head == drafter_config(model)["twigvlm"]["head"]
    assert ("d2t" in weights) == drafter_config(model)["twigvlm"]["maps"] == mapped
    assert drafter_config(model)["draft_vocab_size"] == vocabulary
    if config.get("head") == "shared" and has_head:
        rows = model.base.head.weight[model.twig.draft_token_ids]
        assert torch.equal(weights["lm_head.weight"], rows)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma3", "model type 'gemma3'"),
        ("smolvlm", "model type 'smolvlm'"),
        ("llava_next", "sliding window of 24 tokens"),
    ],
)
def test_what_the_plug_in_cannot_run_is_refused_with_the_reason(tmp_path, name, words):
    model = grown(name, pruning_head=False)
    with pytest.raises(TwigVLMError, match=words):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_diverged_twig_is_not_exported(tmp_path):
    model = grown("llava")
    with torch.no_grad():
        model.twig.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(TwigVLMError, match="NaN"):
        export(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "pixtral", "qwen2_5_vl"])
@pytest.mark.parametrize("pruning_head", [True, False])
@pytest.mark.parametrize("select", [best, diverse])
def test_the_ranking_of_scout_mode_is_the_twig_s(tmp_path, name, pruning_head, select):
    model = grown(name, pruning_head=pruning_head)
    inputs = families.prompt(model.model, name, "images")
    pruning = {"keep": 9, "scout": True, "diverse": select is diverse}
    output = model.generate(**inputs, **pruning, max_new_tokens=1, return_dict_in_generate=True)
    prompt = model.base.prompt(**inputs)
    ranking = Ranking(export(model, tmp_path), torch.float32, torch.device("cpu"))
    last = f"layers.{TRUNK + TWIG - 1}."
    assert any(name.startswith(last) for name, _ in ranking.named_parameters())
    unused = tuple(last + part for part in ("mlp", "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj"))
    assert not any(name.startswith(unused) for name, _ in ranking.named_parameters())
    visual = prompt.visual_mask[0]
    positions = prompt.position_ids[-3:, 0] if prompt.position_ids.ndim == 3 else prompt.position_ids
    kept = ranking(prompt.hidden[0], visual, positions, 9, select)
    assert torch.equal(visual.nonzero()[:, 0][kept], output.kept_indices[0])


@pytest.mark.parametrize(
    "lost", ["layers.0.mlp.down_proj.weight", f"layers.{TRUNK + TWIG - 1}.self_attn.k_proj.weight"]
)
def test_a_ranking_without_all_of_its_weights_is_refused(tmp_path, lost):
    folder = export(grown("llava"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
        Ranking(folder, torch.float32, torch.device("cpu"))
