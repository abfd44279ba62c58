import dataclasses

import pytest
from PIL import Image

from twigvlm.cli import answer
from twigvlm.cli.commands import COMMANDS, DESCRIPTION
from twigvlm.cli.main import main
from twigvlm.cli.parsing import parse
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


def rows(out):
    """Cells of the table's rows by their titles, wrapped lines joined."""
    found, title = {}, None
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 4:
            title = cells[0] or title
            found.setdefault(title, [[], [], []])
            for column, cell in zip(found[title], cells[1:], strict=True):
                column.append(cell)
    return {title: [" ".join(filter(None, column)) for column in columns] for title, columns in found.items()}


def test_tables_and_picture(capsys, arguments, tmp_path):
    assert main(arguments()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "What is [bold]it?" in out
    table = rows(out)
    plain, exact, pruned = table["visual tokens"]
    assert plain == exact == "16 of 16"
    assert pruned.startswith("5 of 16 kept (8 on average over the layers)")
    assert table["same answer"][1] == "yes"
    assert table["speed-up"][0] == "1.00x"
    summary = " ".join(out.split())
    assert "Speculation: " in summary
    assert "same answers as the base's: 1 of 1" in summary
    assert "Pruning + speculation: " in summary
    with Image.open(tmp_path / "kept.png") as shown:
        assert shown.width >= 1008
        assert shown.height > 672  # a caption below
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "picture.png"]


def test_a_short_question_and_a_description_are_asked_unless_told_otherwise(capsys, arguments):
    words = arguments()
    at = words.index("--prompt")
    assert main([*words[:at], *words[at + 2 :]]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "What does the sign say?" in out
    assert "Describe this image in detail." in out
    assert "same answers as the base's: 2 of 2" in out


def test_what_was_chosen_again_is_shown(capsys, arguments, tmp_path):
    assert main(arguments(refocus=1.0, **{"max-new-tokens": 12})) == 0
    assert "chosen again" in rows(capsys.readouterr().out)["visual tokens"][2]
    with Image.open(tmp_path / "kept.png") as again:
        size = again.size
    assert main(arguments(refocus="None", **{"max-new-tokens": 12})) == 0
    assert "again" not in rows(capsys.readouterr().out)["visual tokens"][2]
    with Image.open(tmp_path / "kept.png") as once:
        assert once.width < size[0]


def test_without_pruning_the_answer_is_the_same(capsys, arguments):
    assert main(arguments(retain="None")) == 0
    out = capsys.readouterr().out
    assert out.count("16 of 16") == 2
    assert "Speculation: " in out
    assert "Pruning" not in out


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
    assert twig == [None] * 6
    assert f"attend by {faster}" in capsys.readouterr().out


def test_bad_input(refused, arguments, tmp_path):
    refused(*arguments(runs=0), words=["runs=0"])
    refused(*arguments(out=tmp_path), words=["out"])
    refused(*arguments(out=tmp_path / "kept.txt"), words=["kept.txt", ".png"])
    refused(*arguments(out=tmp_path / "none" / "kept.png"), words=["no writable directory"])
    refused(*arguments(retain="None", speculate="none"), words=["nothing to do"])
    refused(*arguments(retain=100), words=["retain"])
    refused(*arguments(retain="None", refocus=0.5), words=["refocus=0.5", "needs a budget"])
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


def test_float32_unless_told_otherwise_so_that_speculation_is_seen_to_change_nothing():
    assert parse(COMMANDS, DESCRIPTION, ["demo"]).dtype == "float32"


def test_kept_tokens_differ_from_each_other_unless_told_otherwise(arguments, tmp_path):
    shown = []
    for flag in (None, "--no-diverse"):
        assert main([*arguments(refocus="None", speculate="none", runs=1), *filter(None, [flag])]) == 0
        shown.append((tmp_path / "kept.png").read_bytes())
    assert shown[0] != shown[1]
