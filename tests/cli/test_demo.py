import dataclasses

import pytest
from PIL import Image

from twigvlm.cli import answer
from twigvlm.cli.main import main
from twigvlm.errors import TwigVLMError


@pytest.fixture
def arguments(picture, base_directory, twig_directory, tmp_path):
    basic = {
        "image": picture,
        "prompt": "What is [bold]it?",
        "model": base_directory,
        "twig": twig_directory,
        "retain": 8,
    }

    def build(**changes):
        options = {**basic, "device": "cpu", "max-new-tokens": 6, "runs": 2, "out": tmp_path / "kept.png", **changes}
        return ["demo", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]

    return build


def test_table_and_picture(capsys, arguments, tmp_path):
    assert main(arguments()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "What is [bold]it?" in out
    assert "16 of 16" in out
    assert "5 of 16" in out
    for row in ("same answer", "attention", "tokens/s", "speed-up"):
        assert row in out
    with Image.open(tmp_path / "kept.png") as shown:
        assert min(shown.size) == 672
        assert shown.width / shown.height == pytest.approx(1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "picture.png"]


def test_without_pruning_every_patch_is_kept_and_the_answer_is_the_same(capsys, arguments):
    assert main(arguments(retain="None")) == 0
    out = capsys.readouterr().out
    assert out.count("16 of 16") == 2
    same = next(line for line in out.splitlines() if "same answer" in line)
    assert "yes" in same


@pytest.mark.parametrize("faster", ["eager", "sdpa"])
def test_plain_runs_attend_by_what_is_faster_here(capsys, arguments, monkeypatch, faster):
    real, plain, twig = answer.answer_question, [], []

    def answer_question(opened, *rest, accelerated, attention=None):
        given = real(opened, *rest, accelerated=accelerated, attention=attention)
        (twig if accelerated else plain).append(attention)
        assert opened.model.base.attention == "sdpa"  # as it was loaded
        return dataclasses.replace(given, prefill_ms=1.0, decode_ms=1.0 if attention == faster else 2.0)

    monkeypatch.setattr(answer, "answer_question", answer_question)
    assert main(arguments(runs=2)) == 0
    assert plain == ["sdpa", "eager", "sdpa", "eager", faster, faster]  # the first two to warm up
    assert twig == [None] * 3
    row = next(line for line in capsys.readouterr().out.splitlines() if "attention" in line)
    assert row.split()[1::2] == ["attention", faster, "sdpa"]


def test_bad_input(refused, arguments, tmp_path):
    refused(*arguments(runs=0), words=["runs=0"])
    refused(*arguments(out=tmp_path), words=["out"])
    refused(*arguments(out=tmp_path / "kept.txt"), words=["kept.txt", ".png"])
    refused(*arguments(out=tmp_path / "none" / "kept.png"), words=["no writable directory"])
    refused(*arguments(retain="None", speculate="none"), words=["nothing to do"])
    refused(*arguments(retain=100), words=["retain"])
    assert not (tmp_path / "kept.png").exists()


def test_a_picture_that_fails_leaves_nothing(tmp_path, monkeypatch):
    from twigvlm.cli.output import write_picture

    def broken(self, path):
        raise OSError("disk full")

    target = tmp_path / "kept.png"
    target.write_text("before")
    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(TwigVLMError, match=r"kept.png: cannot be written \(disk full\); free space there"):
        write_picture(Image.new("L", (2, 2)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]
    assert target.read_text() == "before"
