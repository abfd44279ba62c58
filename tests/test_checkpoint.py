"""A twig comes back as it was saved, only onto its own base, and never half written."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.checkpoints import twig_files

WEIGHTS, CONFIG = twig_files.WEIGHTS, twig_files.CONFIG


def _trained(config=None, ids=None):
    """A twig that differs from a fresh one."""
    grown = TwigVLM.grow(tiny_llava(), config or TwigConfig(2, 2, final_wipe=5), ids)
    with torch.no_grad():
        for parameter in grown.twig.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return grown


@pytest.mark.parametrize("head", ["own", "shared"])
@pytest.mark.parametrize("ids", [None, torch.tensor([5, 9, 2, 77])], ids=["whole", "reduced"])
def test_round_trip(tmp_path, head, ids):
    config = TwigConfig(2, 2, head=head, draft_vocabulary=None if ids is None else len(ids), final_wipe=5)
    before = _trained(config, ids)
    before.save_pretrained(tmp_path / "twig")
    after = TwigVLM.from_pretrained(tiny_llava(), tmp_path / "twig")
    assert after.twig.config == config
    state = before.twig.state_dict()
    assert after.twig.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.twig.state_dict().items())
    options = {"max_new_tokens": 12, "keep": 4, "speculate": "chain", "return_dict_in_generate": True}
    one, other = before.generate(**prompt(), **options), after.generate(**prompt(), **options)
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.kept_indices[0], other.kept_indices[0])
    assert one.drafted_lengths == other.drafted_lengths
    hidden = torch.randn(1, 2, 32)
    assert torch.equal(before.twig.logits(hidden), after.twig.logits(hidden))


def test_round_trip_of_a_p_head(tmp_path):
    before = _trained(TwigConfig(2, 2, pruning_head=True))
    before.save_pretrained(tmp_path)
    after = TwigVLM.from_pretrained(tiny_llava(), tmp_path)
    state = before.twig.state_dict()
    assert {name for name in state if "pruning" in name} == {
        "pruning_head.query_gate.weight",
        "pruning_head.key_gate.weight",
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.twig.state_dict().items())
    options = {"max_new_tokens": 1, "keep": 4, "return_dict_in_generate": True}
    kept = [model.generate(**prompt(), **options).kept_indices[0] for model in (before, after)]
    assert torch.equal(*kept)


def test_a_config_from_before_p_heads_loads(tmp_path):
    _trained().save_pretrained(tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())
    del record["twig"]["pruning_head"]
    (tmp_path / CONFIG).write_text(json.dumps(record))
    assert TwigVLM.from_pretrained(tiny_llava(), tmp_path).twig.pruning_head is None


def test_the_twig_alone_is_saved(tmp_path):
    grown = _trained(TwigConfig(2, 2, head="shared"))
    grown.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([WEIGHTS, CONFIG, twig_files.CARD])
    names = load_file(tmp_path / WEIGHTS).keys()
    assert all(name.startswith(("layers.0.", "layers.1.", "norm.")) for name in names)
    assert len(names) == 2 * 9 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_another_dtype_is_the_same_base(tmp_path, dtype):
    _trained().save_pretrained(tmp_path)
    after = TwigVLM.from_pretrained(tiny_llava().to(dtype), tmp_path)
    assert after.twig.norm.weight.dtype == dtype
    assert after.generate(**prompt(), max_new_tokens=3, keep=4).shape == (1, 28)
    half = TwigVLM.grow(tiny_llava().to(dtype), TwigConfig(2, 2))
    half.save_pretrained(tmp_path)
    TwigVLM.from_pretrained(tiny_llava(), tmp_path)


@pytest.mark.parametrize(
    ("base", "difference"),
    [
        (lambda: tiny_llava(seed=1), "weights of .* differ"),
        (lambda: tiny_llava(layers=7), "num_hidden_layers 6, this has 7"),
    ],
)
def test_another_base_is_refused(tmp_path, base, difference):
    _trained().save_pretrained(tmp_path)
    with pytest.raises(TwigVLMError, match=f"grew on another base .*{difference}"):
        TwigVLM.from_pretrained(base(), tmp_path)


def test_a_fingerprint_that_is_no_number_fits_no_base(tmp_path):
    _trained().save_pretrained(tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())
    name, values = next(iter(record["base"]["samples"].items()))
    record["base"]["samples"][name] = [float("nan")] * len(values)
    (tmp_path / CONFIG).write_text(json.dumps(record))
    with pytest.raises(TwigVLMError, match=f"grew on another base .weights of {name} differ"):
        TwigVLM.from_pretrained(tiny_llava(), tmp_path)


def test_a_slightly_trained_base_is_another_base(tmp_path):
    _trained().save_pretrained(tmp_path)
    base = tiny_llava()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.02)
    with pytest.raises(TwigVLMError, match="grew on another base"):
        TwigVLM.from_pretrained(base, tmp_path)


def test_a_truncated_file(tmp_path):
    _trained().save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(TwigVLMError, match=f"{WEIGHTS}: truncated") as caught:
            TwigVLM.from_pretrained(tiny_llava(), tmp_path)
        assert "\n" not in str(caught.value)


def test_a_save_that_was_cut_off_between_its_files(tmp_path):
    _trained().save_pretrained(tmp_path)
    before = (tmp_path / CONFIG).read_text()
    _trained(TwigConfig(3, 2)).save_pretrained(tmp_path)  # of the same shapes
    (tmp_path / CONFIG).write_text(before)
    with pytest.raises(TwigVLMError, match=f"weights and {CONFIG} come from different twigs"):
        TwigVLM.from_pretrained(tiny_llava(), tmp_path)


def test_keys_and_shapes_are_strict(tmp_path):
    _trained().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    renamed = {
        name.replace("norm.weight", "norm.wait"): tensor for name, tensor in state.items() if "layer" not in name
    }
    for broken, message in (
        ({**state, "extra": torch.zeros(1)}, "unexpected keys extra"),
        ({name: tensor for name, tensor in state.items() if name != "norm.weight"}, "missing keys norm.weight"),
        ({**state, "norm.weight": torch.zeros(31)}, r"norm.weight has shape \[31\], not \[32\]"),
        (renamed, "missing keys .*norm.weight.*unexpected keys norm.wait"),
    ):
        save_file(broken, tmp_path / WEIGHTS)
        with pytest.raises(TwigVLMError, match=f"{WEIGHTS}: {message}") as caught:
            TwigVLM.from_pretrained(tiny_llava(), tmp_path)
        assert "\n" not in str(caught.value)


def test_a_reduced_vocabulary_needs_its_ids(tmp_path):
    _trained(TwigConfig(2, 2, draft_vocabulary=2), torch.tensor([3, 4])).save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    del state["draft_token_ids"]
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(TwigVLMError, match="missing keys draft_token_ids"):
        TwigVLM.from_pretrained(tiny_llava(), tmp_path)


def test_broken_configs(tmp_path):
    with pytest.raises(TwigVLMError, match="no twig here"):
        TwigVLM.from_pretrained(tiny_llava(), tmp_path / "nowhere")
    _trained().save_pretrained(tmp_path)
    whole = json.loads((tmp_path / CONFIG).read_text())
    for text, message in (
        ('{"twig": {', "cannot be read"),
        ("[]", "not a twig's config"),
        (json.dumps({**whole, "base": {}}), "not a twig's config"),
        (json.dumps({**whole, "twig": {"trunks": 3}}), "not a twig's config"),
        (json.dumps({**whole, "twig": {"twig_layers": 0}}), "twig_layers=0"),
        (json.dumps({**whole, "twig": {"pruning_head": "false"}}), "pruning_head='false': must be True or False"),
        (json.dumps({**whole, "base": {**whole["base"], "samples": {"a": ["x"]}}}), "not a twig's config"),
        (json.dumps({**whole, "base": {**whole["base"], "samples": {"a": 1}}}), "not a twig's config"),
        (json.dumps({**whole, "base": {**whole["base"], "samples": {"lm_head.weight": {}}}}), "not a twig's config"),
        (json.dumps({**whole, "base": {**whole["base"], "samples": {"lm_head.weight": [1]}}}), "not a twig's config"),
    ):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(TwigVLMError, match=message) as caught:
            TwigVLM.from_pretrained(tiny_llava(), tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / CONFIG).write_text(json.dumps(whole))
    state = load_file(tmp_path / WEIGHTS)
    for text in ("{", "[1]", '{"trunks": 3}', '{"twig_layers": 0}'):
        save_file(state, tmp_path / WEIGHTS, metadata={"twig": text})
        with pytest.raises(TwigVLMError, match=f"{WEIGHTS}: does not say which twig it holds") as caught:
            TwigVLM.from_pretrained(tiny_llava(), tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(TwigVLMError, match=f"{WEIGHTS} is missing"):
        TwigVLM.from_pretrained(tiny_llava(), tmp_path)


def test_a_failed_save_leaves_the_old_twig(tmp_path, monkeypatch):
    grown = _trained()
    grown.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def half(state, file, metadata):
        with open(file, "wb") as stream:
            stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(twig_files, "save_file", half)
    with pytest.raises(TwigVLMError, match=r"twig_model.safetensors: cannot be written .disk full.; free space there"):
        grown.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_file_is_no_place_for_a_twig(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(TwigVLMError, match="is a file"):
        _trained().save_pretrained(tmp_path / "taken")


def test_a_diverged_twig_is_not_saved(tmp_path):
    grown = _trained()
    grown.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    for value in (float("nan"), float("-inf")):
        with torch.no_grad():
            grown.twig.norm.weight[3] = value
        with pytest.raises(
            TwigVLMError, match=r"not saved: NaN or infinite values in norm.weight; .*lower learning rate"
        ):
            grown.save_pretrained(tmp_path)
        with pytest.raises(TwigVLMError, match="not saved"):
            grown.save_pretrained(tmp_path / "new")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_diverged_twig_is_not_loaded(tmp_path):
    _trained().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for name in ("norm.weight", "head.weight"):
        state[name][0] = float("nan")
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(TwigVLMError, match=f"{WEIGHTS}: NaN or infinite values in .*weight and 1 more; .*diverged"):
        TwigVLM.from_pretrained(tiny_llava(), tmp_path)
    with pytest.raises(TwigVLMError, match="NaN or infinite"):
        twig_files.check(tmp_path)


def test_a_twig_that_float16_cannot_hold_is_not_loaded_in_it(tmp_path):
    grown = _trained()
    with torch.no_grad():
        grown.twig.norm.weight[3] = 1e6
    grown.save_pretrained(tmp_path)
    assert TwigVLM.from_pretrained(tiny_llava().bfloat16(), tmp_path).twig.norm.weight[3] > 9e5
    with pytest.raises(TwigVLMError, match=r"norm.weight; they exceed the range of float16, load the base in bfloat16"):
        TwigVLM.from_pretrained(tiny_llava().half(), tmp_path)


def test_a_twig_is_checked_without_its_base(tmp_path):
    config = TwigConfig(2, 2, pruning_head=True)
    _trained(config).save_pretrained(tmp_path)
    assert twig_files.check(tmp_path) == config
    (tmp_path / WEIGHTS).write_bytes(b"cut off")
    with pytest.raises(TwigVLMError, match="truncated"):
        twig_files.check(tmp_path)
    with pytest.raises(TwigVLMError, match="no twig here"):
        twig_files.check(tmp_path / "none")
