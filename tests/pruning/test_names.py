"""What the name of a published method may say beside the method, and budgets as authors count them."""

import pytest

from twigvlm.cli.main import main
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.methods import NAMES
from twigvlm.pruning.cut import average_visual
from twigvlm.pruning.methods import make_pruner, method_files, reads_files
from twigvlm.pruning.methods.dart import Dart
from twigvlm.pruning.methods.sparsevlm import SparseVLM
from twigvlm.pruning.methods.visionzip import VisionZip


@pytest.mark.parametrize(
    ("name", "pruner"),
    [
        ("visionzip:compacted", VisionZip(positions="compacted")),
        ("visionzip:a/b:compacted", VisionZip(positions="compacted", projector="a/b")),
        ("sparsevlm:published:compacted", SparseVLM(accounting="published", positions="compacted")),
        ("sparsevlm-v2:published", SparseVLM("v2", accounting="published")),
        ("dart:3:published", Dart(layer=3, accounting="published")),
    ],
)
def test_names_say_positions_and_accounting(name, pruner):
    assert make_pruner(name) == pruner
    assert reads_files(name) == (getattr(pruner, "projector", None) is not None)


def test_what_a_file_of_a_method_holds_is_told_apart(tmp_path):
    names = ["fastv", f"visionzip:{tmp_path}:compacted", f"fitprune:{tmp_path}", None]
    assert method_files(names) == {}
    (tmp_path / "fitprune.json").write_text("first")
    first = method_files(names)
    assert first.keys() == {f"fitprune:{tmp_path}"}
    (tmp_path / "fitprune.json").write_text("second")
    assert method_files(names).keys() == first.keys()
    assert method_files(names) != first
    (tmp_path / "projector.safetensors").write_text("weights")
    assert f"visionzip:{tmp_path}:compacted" in method_files(names)


def test_the_list_of_methods_has_all_that_evaluations_accept(capsys):
    assert main(["methods"]) == 0
    listed = {line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert {*NAMES} - {"none"} <= listed


def test_what_some_methods_cannot_do_without_is_asked_for(tmp_path):
    with pytest.raises(TwigVLMError, match="needs the layer to cut after"):
        make_pruner("random")
    with pytest.raises(TwigVLMError, match="needs the directory of a schedule"):
        make_pruner("fitprune")
    with pytest.raises(TwigVLMError, match="was not published with other positions"):
        make_pruner("fitprune:a:compacted")
    assert reads_files("fitprune:a")
    with pytest.raises(TwigVLMError, match=r"fitprune\.json is not there; make one"):
        make_pruner(f"fitprune:{tmp_path}")
    for broken in ("", "[]", '{"kept": 3}', '{"kept": [0.5, 0.6]}', '{"kept": [2, 1]}', '{"kept": []}'):
        (tmp_path / "fitprune.json").write_text(broken)
        with pytest.raises(TwigVLMError, match="not a schedule"):
            make_pruner(f"fitprune:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("visionzip:", "nothing follows a colon; leave the colon out"),
        ("fastv:", "nothing follows a colon"),
        ("cdpruner::compacted", "nothing follows a colon"),
        ("fastv:x", "'x' is not a layer; give its number, for example fastv:3"),
        ("fastv:²", "'²' is not a layer"),
        ("fastv:2:3", "'2:3' is not a layer"),
        ("random:-1", "'-1' is not a layer; give its number, for example random:3"),
        ("random:", "needs the layer to cut after"),
        ("fitprune:", "needs the directory of a schedule"),
        ("cdpruner:3", "takes no layer; give one only to dart, fastv, random"),
        ("pyramiddrop:published", "pyramiddrop counts its budget in one way only; leave out published$"),
        ("visionzip:published:compacted", "visionzip counts its budget in one way only; leave out published$"),
        ("sparsevlm-v2:compacted", "sparsevlm-v2': was not published with other positions; leave out compacted$"),
        ("dart:compacted", "dart was not published with other positions; leave out compacted$"),
        (
            "fastv:published:compacted",
            "fastv was not .* positions and counts .* only; leave out compacted and published$",
        ),
    ],
)
def test_names_that_say_nothing_sound_are_refused_with_what_is_wrong(name, words):
    with pytest.raises(TwigVLMError, match=words) as caught:
        make_pruner(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pruner", "sizes", "true"),
    [
        (
            SparseVLM("v1", "published"),
            {192: [309, 204, 113], 128: [312, 117, 39], 96: [249, 55, 27], 64: [82, 32, 18]},
            {192: 206.5, 128: 145.9, 96: 114.1, 64: 82.2},
        ),
        (
            SparseVLM("v2", "published"),
            {192: [300, 200, 118], 128: [238, 108, 60], 96: [246, 54, 28], 64: [66, 34, 20]},
            {192: 207.1, 128: 144.2, 96: 114.2, 64: 81.8},
        ),
        (
            Dart(accounting="published"),
            {192: [196], 128: [132], 100: [100], 64: [68]},
            {192: 219.8, 128: 159.8, 100: 129.8, 64: 99.8},
        ),
    ],
)
def test_published_accounting(pruner, sizes, true):
    """The authors' own lists, which cost more than what their papers call them."""
    for retain, expected in sizes.items():
        cuts = pruner.cuts(retain, 576, 32)
        assert [cut.keep for cut in cuts] == expected
        assert average_visual(cuts, 576, 32) == pytest.approx(true[retain], abs=0.6)
