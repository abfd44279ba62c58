"""Private names of torch, transformers and accelerate still do what they are used for."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from tokenizers.pre_tokenizers import CharDelimiterSplit
from torch import nn
from transformers import PrefixConstrainedLogitsProcessor, TrainingArguments

from tests.test_loading import place_of_parts
from tests.tiny import prompt, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm import compat
from twigvlm.compat.trainer import StagedTrainer, use_one_gpu


@pytest.mark.skipif(not compat.HAS_ONEDNN_LINEAR, reason="this build of torch has no oneDNN")
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_multiplies_as_torch_does(bias):
    layer, states = nn.Linear(40, 24, bias), torch.randn(2, 5, 40)
    torch.testing.assert_close(compat.onednn_linear(states, layer.weight, layer.bias), layer(states))


@pytest.mark.skipif(not compat.HAS_ONEDNN_SWITCH, reason="this build of torch has no oneDNN")
def test_onednn_is_switched_off_for_a_while():
    enabled = torch.backends.mkldnn.enabled
    with compat.without_onednn():
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == enabled


def test_whether_a_cpu_has_instructions_for_bfloat16_is_known():
    assert compat.has_bfloat16_instructions() in (True, False)


def test_the_parts_of_a_module_are_its_children():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    module.register_module("none", None)
    assert compat.parts(module) == [*module.children()]


def test_compiled_modules_are_told_from_others():
    plain, in_place, inner = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    in_place.compile(backend="eager")
    wrapper = torch.compile(inner, backend="eager")
    assert [compat.is_compiled(module) for module in (plain, in_place, inner, wrapper)] == [False, True, False, True]
    assert compat.uncompiled(wrapper) is inner
    assert compat.uncompiled(plain) is plain
    assert [compat.uncompiled_name(name) for name, _ in nn.Sequential(wrapper).named_parameters()] == [
        name for name, _ in nn.Sequential(plain).named_parameters()
    ]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_how_a_model_attends(implementation):
    model = tiny_llava(attention=implementation)
    assert compat.attention_implementation(model.config.get_text_config()) == implementation
    model.set_attn_implementation("eager")
    assert compat.attention_implementation(model.model.language_model.layers[0].self_attn.config) == "eager"


def test_a_layer_runs_again_for_its_gradients():
    model = tiny_llava().train()
    layer, runs = model.model.language_model.layers[1], []
    layer.mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    for on, expected in ((False, 1), (True, 2)):
        compat.checkpoint_gradients(layer, on)
        runs.clear()
        model(**prompt()).logits.sum().backward()
        assert len(runs) == expected


def test_the_tokenizer_inside_another_is_exchanged():
    tokenizer = tiny_processor().tokenizer
    assert len(tokenizer("a b").input_ids) == 3
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = CharDelimiterSplit(" ")
    compat.set_backend_tokenizer(tokenizer, backend)
    assert len(tokenizer("a b").input_ids) == 2


def test_the_function_of_a_prefix_constraint():
    def allowed(row, ids):
        return [1]

    assert compat.prefix_function(PrefixConstrainedLogitsProcessor(allowed, 1)) is allowed


def test_a_checkpoint_is_written_into_a_folder(tmp_path):
    """Once into another folder than the Trainer's own; then, as anywhere, into that."""
    saved = []

    class Into(StagedTrainer):
        def write_checkpoint(self, model, write):
            write("apart" if not saved else "")
            saved.append(model)

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return {"loss": (x * self.weight).square().sum()}

    arguments = TrainingArguments(tmp_path, max_steps=2, save_steps=1, report_to="none", use_cpu=True)
    use_one_gpu(arguments)
    assert arguments.n_gpu in (0, 1)
    Into(Squared(), arguments, train_dataset=[{"x": torch.ones(2)}] * 4).train()
    assert len(saved) == 2
    assert (tmp_path / "apart" / "checkpoint-1" / "trainer_state.json").exists()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    assert not (tmp_path / "checkpoint-1").exists()


def test_where_accelerate_runs_a_module():
    plain, hooked, several = (nn.Linear(2, 2) for _ in range(3))
    add_hook_to_module(hooked, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(several, SequentialHook(AlignDevicesHook(execution_device="cpu")))
    assert compat.execution_device(hooked) == torch.device("cpu")
    assert compat.execution_device(plain) is None
    assert compat.execution_device(several) is None


def test_weights_that_accelerate_keeps_elsewhere_are_brought(tmp_path):
    base = tiny_llava()
    expected = base.lm_head.weight.clone()
    dispatch_model(base, place_of_parts(base, ["disk"] * 6, "cpu", "disk"), offload_dir=tmp_path)
    assert base.lm_head.weight.is_meta
    with compat.present(base.lm_head):
        assert torch.equal(base.lm_head.weight, expected)
    assert base.lm_head.weight.is_meta
    with compat.present(nn.Linear(2, 2)) as nothing:
        assert nothing is None
