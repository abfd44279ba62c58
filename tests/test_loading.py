"""Bases as they are loaded: in number formats, on several devices, partly on the disk, quantised, with merged updates."""

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from tests import families
from tests.devices import FIRST, SECOND, devices
from tests.test_published import published
from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.base.families import family_of
from twigvlm.base.layers import project_keys_values, project_queries
from twigvlm.checkpoints.milvlg import import_milvlg

CONFIG = TwigConfig(2, 2, pruning_head=True, final_wipe=5)
TREE = {"speculate": "tree", "tree_depth": 3, "tree_width": 4, "tree_expand": 3, "tree_nodes": 12}
CHAIN = {"speculate": "chain", "draft_threshold": 0.0}


def place_of_parts(model, layer_places, near, far):
    """A device map: the embeddings and all before them `near`, the last norm and a head that is not tied to them `far`."""
    decoder = family_of(model).decoder
    body, language = model.model, model.get_submodule(decoder)
    names = [name for name, _ in (*body.named_children(), *body.named_parameters(recurse=False))]
    parts = {f"model.{name}": near for name in names if f"model.{name}" != decoder}
    parts |= {f"{decoder}.{name}": near for name, _ in language.named_children() if name != "layers"}
    parts |= {f"{decoder}.layers.{index}": place for index, place in enumerate(layer_places)}
    head = near if model.lm_head.weight is model.get_input_embeddings().weight else far
    return {**parts, f"{decoder}.norm": far, "lm_head": head}


def answers(model, inputs, ways=(CHAIN, TREE)):
    """Tokens, kept tokens and accepted lengths of each way, and of an answer without any."""
    output = []
    for way in ({}, *ways):
        one = model.generate(**inputs, **way, keep=3, max_new_tokens=6, return_dict_in_generate=True)
        output.append((one.sequences.tolist(), one.kept_indices[0].tolist(), one.accepted_lengths))
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_twig_has_its_base_s_dtype(tmp_path, dtype):
    grown = TwigVLM.grow(tiny_llava().to(dtype), CONFIG)
    grown.save_pretrained(tmp_path / "twig")
    whole = TwigVLM.grow(tiny_llava(), CONFIG)
    whole.save_pretrained(tmp_path / "float32")
    (tmp_path / "published").mkdir()
    save_file(published(whole.twig), tmp_path / "published" / "model.safetensors")
    models = [
        grown,
        TwigVLM.from_pretrained(tiny_llava().to(dtype), tmp_path / "twig"),
        TwigVLM.from_pretrained(tiny_llava().to(dtype), tmp_path / "float32"),
        import_milvlg(tiny_llava().to(dtype), tmp_path / "published", trunk_layers=2),
    ]
    for model in models:
        assert {parameter.dtype for parameter in model.twig.parameters()} == {dtype}
        inputs = prompt()
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        assert model.generate(**inputs, **CHAIN, keep=4, max_new_tokens=4).shape == (1, 29)


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # of parameters
@pytest.mark.parametrize("name", families.TINY)
def test_layers_on_two_devices(tmp_path, name):
    """Layer K is on the second device, so that the trunk is on both; nothing may be mixed, and nothing changes."""
    whole = TwigVLM.grow(families.tiny(name), CONFIG)
    whole.save_pretrained(tmp_path)
    inputs = families.prompt(whole.model, name, "images")
    with devices():
        base = families.tiny(name)
        places = [FIRST, *[SECOND] * (families.LAYERS - 1)]
        for key, parameter in list(base.model.named_parameters(recurse=False)):  # accelerate moves modules only
            setattr(base.model, key, nn.Parameter(parameter.detach().to(FIRST)))
        keys = base._skip_keys_device_placement
        dispatch_model(base, place_of_parts(base, places, FIRST, SECOND), main_device=FIRST, skip_keys=keys)
        here = {key: value.to(FIRST) for key, value in inputs.items()}
        model = TwigVLM.from_pretrained(base, tmp_path)
        assert {str(parameter.device) for parameter in model.twig.parameters()} == {FIRST}
        assert answers(model, here, [TREE]) == answers(whole, inputs, [TREE])
        fresh = TwigVLM.grow(base, TwigConfig(2, 2, head="shared")).twig
        assert torch.equal(fresh.layers[0].mlp.up_proj.weight.cpu(), whole.twig.layers[0].mlp.up_proj.weight)
        captured = model.base.prompt(**here)
        rope, deep = model.base.token_inputs(captured), model.base.layers[4]
        states = [project_queries(deep, captured.hidden, rope), *project_keys_values(deep, captured.hidden, rope)]
        states += [fresh.logits(captured.hidden), model.base.logits(captured.hidden)]
        assert {str(one.device) for one in states} == {FIRST}


def test_sampling_and_batches_on_two_devices(tmp_path):
    whole = TwigVLM.grow(tiny_llava(), CONFIG)
    whole.save_pretrained(tmp_path)
    two = {
        key: torch.cat((value, other)) for (key, value), other in zip(prompt().items(), prompt(1).values(), strict=True)
    }
    with devices():
        base = tiny_llava()
        keys = base._skip_keys_device_placement
        places = place_of_parts(base, [FIRST, *[SECOND] * 5], FIRST, SECOND)
        model = TwigVLM.from_pretrained(dispatch_model(base, places, main_device=FIRST, skip_keys=keys), tmp_path)
        for inputs in (prompt(), two):
            for way in ({}, CHAIN, TREE):
                options = {**way, "keep": 3, "max_new_tokens": 6}
                here = {key: value.to(FIRST) for key, value in inputs.items()}
                assert model.generate(**here, **options).tolist() == whole.generate(**inputs, **options).tolist()
                if inputs is two:
                    continue  # a batch draws from generators of the device, which these devices do not have
                torch.manual_seed(0)
                drawn = model.generate(**here, **options, do_sample=True)
                torch.manual_seed(0)
                assert drawn.tolist() == whole.generate(**inputs, **options, do_sample=True).tolist()


@pytest.mark.parametrize("head", ["own", "shared"])
def test_layers_on_the_disk(tmp_path, head):
    """Their weights are there only while accelerate runs them; growing, saving, loading and answering get at them."""
    config = TwigConfig(2, 2, head=head, final_wipe=5)
    whole = TwigVLM.grow(tiny_llava(), config)
    expected = answers(whole, prompt())
    base = tiny_llava()
    dispatch_model(base, place_of_parts(base, ["disk"] * 6, "cpu", "disk"), offload_dir=tmp_path / "disk")
    assert base.model.language_model.layers[2].mlp.up_proj.weight.is_meta
    assert base.lm_head.weight.is_meta
    grown = TwigVLM.grow(base, config)
    grown.save_pretrained(tmp_path / "twig")
    whole.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "twig" / "twig_config.json").read_text() == (tmp_path / "whole" / "twig_config.json").read_text()
    for model in (grown, TwigVLM.from_pretrained(base, tmp_path / "whole")):
        assert answers(model, prompt()) == expected
        torch.manual_seed(0)
        drawn = model.generate(**prompt(), keep=3, max_new_tokens=4, do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(drawn, whole.generate(**prompt(), keep=3, max_new_tokens=4, do_sample=True))
        with model.disabled(), whole.disabled():
            options = {**prompt(), "max_new_tokens": 4, "do_sample": False}
            assert torch.equal(model.generate(**options), whole.generate(**options))


class Codes(nn.Module):
    """A linear layer that holds codes of 8 bits, as quantisation backends put in place of `nn.Linear`."""

    def __init__(self, linear, name):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127)
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        setattr(self, name, nn.Parameter(codes, requires_grad=False))
        self.bias, self.name = linear.bias, name

    def plain(self):
        return getattr(self, self.name) * self.scale

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.plain(), self.bias)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"], ids=["without bias", "with bias"])
@pytest.mark.parametrize("name", ["weight", "qweight"])
def test_a_quantised_base(tmp_path, name, family):
    """A stand-in for bitsandbytes, torchao, GPTQ and the like: of their layers we use only that they act as linear ones."""
    whole = TwigVLM.grow(families.tiny(family), CONFIG)
    inputs = families.prompt(whole.model, family, "images")
    base = families.tiny(family)
    for layer in base.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for projection, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, projection, Codes(linear, name))
    model = TwigVLM.grow(base, CONFIG)
    for ours, theirs in zip(model.twig.layers, base.model.language_model.layers[2:4], strict=True):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            linear, codes = ours.get_submodule(part), theirs.get_submodule(part)
            assert isinstance(linear, nn.Linear)
            torch.testing.assert_close(linear.weight, codes.plain(), rtol=1e-4, atol=1e-5)
            assert codes.bias is None or torch.equal(linear.bias, codes.bias)
    model.save_pretrained(tmp_path / "quantised")
    whole.save_pretrained(tmp_path / "whole")
    back = TwigVLM.from_pretrained(families.tiny(family), tmp_path / "quantised")
    assert torch.equal(back.twig.norm.weight, model.twig.norm.weight)
    loaded = TwigVLM.from_pretrained(base, tmp_path / "whole")
    sequences = {str(sequence) for sequence, _, _ in answers(loaded, inputs)}
    assert len(sequences) == 1
    with pytest.raises(TwigVLMError, match="grew on another base"):
        TwigVLM.from_pretrained(families.tiny(family, seed=1), tmp_path / "quantised")


@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="this build of torch has no quantised layers")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"], ids=["without bias", "with bias"])
def test_a_dynamically_quantised_base(tmp_path, family):
    """torch's own layers, whose weights and biases are methods."""
    whole = TwigVLM.grow(families.tiny(family), CONFIG)
    whole.save_pretrained(tmp_path)
    inputs = families.prompt(whole.model, family, "images")
    base = torch.ao.quantization.quantize_dynamic(families.tiny(family), {nn.Linear}, dtype=torch.qint8)
    grown = TwigVLM.grow(base, CONFIG)
    source, copied = base.model.language_model.layers[2], grown.twig.layers[0]
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        linear, quantised = copied.get_submodule(part), source.get_submodule(part)
        torch.testing.assert_close(linear.weight, quantised.weight().dequantize(), rtol=0.01, atol=0.01)
        assert (linear.bias is None) == (quantised.bias() is None)
    for model in (grown, TwigVLM.from_pretrained(base, tmp_path)):
        for way in ({}, CHAIN, TREE, {"speculate": "auto"}):
            answer = model.generate(**inputs, **way, keep=3, max_new_tokens=4)
            assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
        with model.disabled():
            assert torch.equal(model.generate(**inputs, max_new_tokens=4), base.generate(**inputs, max_new_tokens=4))


def compile_model(base):
    return torch.compile(base, backend="eager")


def compile_in_place(base):
    base.model.language_model.compile(backend="eager")
    return base


def compile_layers(base):
    layers = base.model.language_model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")
    return base


def compile_parts(base):
    for layer in base.model.language_model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
        layer.self_attn.q_proj.compile(backend="eager")
    base.model.language_model.norm = torch.compile(base.model.language_model.norm, backend="eager")
    base.lm_head = torch.compile(base.lm_head, backend="eager")
    return base


@pytest.mark.parametrize("compiled", [compile_model, compile_in_place, compile_layers, compile_parts])
def test_a_compiled_base(tmp_path, compiled):
    torch._dynamo.reset()
    whole = TwigVLM.grow(tiny_llava(), CONFIG)
    whole.save_pretrained(tmp_path / "whole")
    expected = answers(whole, prompt())
    base = compiled(tiny_llava())
    base.generate(**prompt(), max_new_tokens=2)  # what is compiled now knows of no twig
    grown = TwigVLM.grow(base, CONFIG)
    grown.twig.load_state_dict(whole.twig.state_dict())  # P-Heads are drawn at random
    grown.save_pretrained(tmp_path / "compiled")
    for model in (
        grown,
        TwigVLM.from_pretrained(base, tmp_path / "whole"),
        TwigVLM.from_pretrained(tiny_llava(), tmp_path / "compiled"),
    ):
        assert answers(model, prompt()) == expected


def test_a_base_with_strange_layers_takes_a_grown_twig_only(tmp_path):
    TwigVLM.grow(tiny_llava(), CONFIG).save_pretrained(tmp_path)
    base = tiny_llava()
    attention = base.model.language_model.layers[2].self_attn
    attention.qkv, attention.q_proj = attention.q_proj, nn.Identity()
    with pytest.raises(
        TwigVLMError, match="LlamaDecoderLayer cannot be copied: load the base as transformers makes it"
    ):
        TwigVLM.grow(base, CONFIG)
    TwigVLM.from_pretrained(base, tmp_path)


def with_lora(base):
    """A base with low-rank updates that are not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|up_proj)", init_lora_weights=False)
    return get_peft_model(base, config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_updates_must_be_merged(tmp_path):
    adapted = with_lora(tiny_llava())
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(TwigVLMError, match=r"has adapters .* merge_and_unload\(\)"):
            TwigVLM.grow(model, CONFIG)
    merged = TwigVLM.grow(adapted.merge_and_unload(), CONFIG)
    merged.save_pretrained(tmp_path)
    other = TwigVLM.from_pretrained(with_lora(tiny_llava()).merge_and_unload(), tmp_path)
    assert answers(other, prompt()) == answers(merged, prompt())
    source = merged.base.layers[2].self_attn.q_proj.weight
    assert torch.equal(merged.twig.layers[0].self_attn.q_proj.weight, source)
    assert not torch.equal(source, tiny_llava().model.language_model.layers[2].self_attn.q_proj.weight)
    with pytest.raises(TwigVLMError, match="grew on another base"):
        TwigVLM.from_pretrained(tiny_llava(), tmp_path)
