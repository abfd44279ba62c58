"""Pages of results: what is written by hand stays, what was measured is replaced."""

import shlex

import pytest

from recipes.sapling import results
from twigvlm.cli.commands import COMMANDS, DESCRIPTION
from twigvlm.cli.parsing import parse

REPORT = """# Accuracy

```
twigvlm evaluate accuracy --limit 3
```

| setting | value |
| --- | ---: |
| dtype | float32 |
| seed | 0 |
| number of questions | 3, test split |

## Accuracy

Of 3 answers.

## Descriptions

| a | b |
"""


def test_a_report_becomes_sections_with_what_they_were_measured_on():
    text = results.evaluated(REPORT)
    assert text.startswith(
        "*Measured with: dtype float32, number of questions 3, test split.*\n\n### Accuracy\n\nOf 3 answers."
    )
    assert text.endswith("### Descriptions\n\n| a | b |")
    assert "seed" not in text


def test_what_is_above_the_first_heading_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "DOCS", tmp_path)
    (tmp_path / "speed.md").write_text("# Speed\n\nBy hand.\n\n## Old\n\nfigures\n")
    results.write("speed", ["## New\n\nother figures"])
    assert (tmp_path / "speed.md").read_text() == "# Speed\n\nBy hand.\n\n## New\n\nother figures\n"


def test_a_picture_comes_along(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "DOCS", tmp_path)
    (tmp_path / "run").mkdir()
    assert results.with_figure("![x](figure.png)", tmp_path / "run", "compare-0") == "![x](figure.png)"
    (tmp_path / "run" / "figure.png").write_bytes(b"picture")
    assert results.with_figure("![x](figure.png)", tmp_path / "run", "compare-0") == "![x](compare-0.png)"
    assert (tmp_path / "compare-0.png").read_bytes() == b"picture"


def test_tables_that_a_recipe_prints_are_measured_once(tmp_path):
    (tmp_path / "measured.py").write_text("print('noise')\nprint('| a | 1 |')\nopen('count', 'a').write('x')\n")
    command = f"python {tmp_path / 'measured.py'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert results.measure(command, tmp_path / "out") == "| a | 1 |"
        assert results.measure(command, tmp_path / "out") == "| a | 1 |"
    assert (tmp_path / "count").read_text() == "x"


def test_a_table_of_another_command_is_measured_again(tmp_path):
    (tmp_path / "measured.py").write_text("import sys\nprint(f'| {sys.argv[1]} |')\n")
    command = f"python {tmp_path / 'measured.py'}"
    assert [results.measure(f"{command} {n}", tmp_path / "out") for n in (1, 2, 1)] == ["| 1 |", "| 2 |", "| 1 |"]
    (tmp_path / "out" / "command").unlink()  # as older versions left it: nobody knows what it was measured by
    (tmp_path / "out" / "report.md").write_text("| old |")
    assert results.measure(f"{command} 1", tmp_path / "out") == "| 1 |"


@pytest.mark.parametrize("page", results.PAGES)
def test_titles_texts_and_commands_stand_in_their_page(page):
    text = (results.DOCS / f"{page}.md").read_text(encoding="utf8")
    for number, section in enumerate(results.PAGES[page]):
        assert results.opening(section, results.folder_of(page, number)) in text
    assert text.count("\n## ") == len(results.PAGES[page]), "sections that the generator does not know"


def test_figures_of_other_weights_are_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RUNS", str(tmp_path))
    (tmp_path / "weights").write_text("others")
    with pytest.raises(SystemExit, match="delete it"):
        results.main(results.Options())


def test_every_command_can_be_read_and_asks_for_kinds_that_its_questions_have():
    for page, sections in results.PAGES.items():
        for number, section in enumerate(sections):
            folder = results.folder_of(page, number)
            program, *words = shlex.split(results.whole(section, folder))
            assert program in ("twigvlm", "python")
            if program == "twigvlm":
                command = parse(COMMANDS, DESCRIPTION, words)
                options = getattr(command, "what", command)
                assert options.output == folder
                of = results.MADE_FIRST[str(options.questions)]
                assert "description" not in options.kinds or "--descriptions 0" not in of
    with pytest.raises(SystemExit, match="must be one of"):
        results.main(results.Options(pages=("none",)))


def test_long_lines_are_broken_where_that_changes_nothing():
    table = f"| {'a' * 200} |"
    text = results.wrapped(f"## {'b ' * 100}\n\n{'word ' * 60}\n\n{table}")
    assert table in text
    assert "## " + "b " * 99 + "b" in text
    assert all(len(line) <= results.WIDTH for line in text.splitlines() if line.startswith("word"))
    command = "twigvlm compare --methods " + "fastv " * 30 + "--systems 'pruning + auto' chain"
    lines = results.continued(command).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= results.WIDTH for line in lines)
    assert shlex.split("".join(line.removesuffix("\\") for line in lines)) == shlex.split(command)
