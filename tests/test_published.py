"""A twig in the authors' layout, turned into ours."""

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import VOCABULARY, prompt, tiny_llava
from twigvlm import TwigConfig, TwigVLM, TwigVLMError
from twigvlm.checkpoints.milvlg import import_milvlg
from twigvlm.cli.main import main


def trained(seed=0, pruning_head=False):
    grown = TwigVLM.grow(tiny_llava(), TwigConfig(2, 2, pruning_head=pruning_head))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in grown.twig.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return grown


def published(twig, rows=VOCABULARY, first=0):
    """The authors' keys, for a base whose vocabulary ends at `rows`."""
    state = {f"model.layers.{first}.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for name, tensor in twig.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "layers":
            index, _, rest = rest.partition(".")
            state[f"model.layers.{first + int(index)}.{rest}"] = tensor.clone()
    state["model.norm.weight"] = twig.norm.weight.detach().clone()
    state["lm_head.weight"] = twig.head.weight.detach()[:rows].clone()
    if twig.pruning_head is not None:
        for short, gate in (("q", twig.pruning_head.query_gate), ("k", twig.pruning_head.key_gate)):
            state[f"leaf_attention_module.{short}_gate.weight"] = gate.weight.detach().clone()
    return state


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("pruning_head", [False, True])
def test_weights_arrive(tmp_path, pickled, first, pruning_head):
    original = trained(pruning_head=pruning_head)
    state = published(original.twig, first=first)
    if pickled:
        torch.save(state, tmp_path / "pytorch_model.bin")
        torch.save({"learning_rate": 1e-4}, tmp_path / "training_args.bin")
    else:  # in two files
        names = sorted(state)
        save_file({name: state[name] for name in names[:5]}, tmp_path / "model-1.safetensors")
        save_file({name: state[name] for name in names[5:]}, tmp_path / "model-2.safetensors")
    twig = import_milvlg(tiny_llava(), tmp_path, trunk_layers=2, final_wipe=5).twig
    assert twig.config == TwigConfig(2, 2, final_wipe=5, pruning_head=pruning_head)
    expected = original.twig.state_dict()
    assert twig.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twig.state_dict().items())


def test_a_smaller_vocabulary_drafts_what_it_knows(tmp_path):
    original = trained()
    save_file(published(original.twig, rows=90), tmp_path / "model.safetensors")
    model = import_milvlg(tiny_llava(), tmp_path, trunk_layers=2)
    hidden = torch.randn(1, 2, 32)
    torch.testing.assert_close(model.twig.logits(hidden), original.twig.logits(hidden)[..., :90])
    options = {"max_new_tokens": 10, "keep": 4}
    plain = original.generate(**prompt(), **options)
    assert model.generate(**prompt(), **options, speculate="chain", draft_threshold=0.0).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("lm_head.weight"), "holds no twig"),
        (
            lambda state: state.update({"model.mm_projector.0.weight": torch.ones(2)}),
            "mm_projector.0.weight is not a known part",
        ),
        (lambda state: state.pop("model.layers.0.mlp.up_proj.weight"), "does not fit on this base.*up_proj"),
        (lambda state: state.update({"model.norm.weight": torch.ones(7)}), "does not fit on this base.*norm"),
        (lambda state: state.update({"lm_head.weight": torch.ones(101, 32)}), "its head has 101 rows"),
    ],
)
def test_other_weights_are_refused(tmp_path, change, message):
    state = published(trained().twig)
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(TwigVLMError, match=message) as caught:
        import_milvlg(tiny_llava(), tmp_path, trunk_layers=2)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(TwigVLMError, match=r"no \.safetensors or \.bin file"):
        import_milvlg(tiny_llava(), tmp_path, trunk_layers=2)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(TwigVLMError, match=r"pytorch_model\.bin: cannot be read"):
        import_milvlg(tiny_llava(), tmp_path, trunk_layers=2)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TwigVLMError, match=r"model\.safetensors: cannot be read"):
        import_milvlg(tiny_llava(), tmp_path, trunk_layers=2)


def test_the_command(tmp_path, capsys):
    from tests.tiny_processor import tiny_processor

    base, source, out = tmp_path / "base", tmp_path / "source", tmp_path / "out"
    tiny_llava().save_pretrained(base)
    tiny_processor().save_pretrained(base)
    source.mkdir()
    original = trained()
    save_file(published(original.twig), source / "model.safetensors")
    arguments = ["convert", str(source), str(out), "--from", "milvlg", "--model", str(base)]
    assert main(arguments) == 0
    assert str(out) in capsys.readouterr().out
    loaded = TwigVLM.from_pretrained(tiny_llava(), out)
    assert torch.equal(loaded.twig.head.weight, original.twig.head.weight)
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_diverged_twig_is_refused(tmp_path):
    state = published(trained().twig)
    state["model.norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(TwigVLMError, match=r"NaN or infinite values in norm.weight; the training diverged"):
        import_milvlg(tiny_llava(), tmp_path, trunk_layers=2)
