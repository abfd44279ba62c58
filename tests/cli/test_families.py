from twigvlm.base.families import FAMILIES, LANGUAGE_MODELS
from twigvlm.cli.main import main
from twigvlm.pruning.methods import METHODS


def test_every_family_and_language_model_is_listed(capsys):
    assert main(["families"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "│" in line]
    for entry in (*FAMILIES, *LANGUAGE_MODELS):
        column = 1 if entry in LANGUAGE_MODELS else 2
        assert entry.model_type in {row.split("│")[column].strip() for row in rows}
    assert "images, videos" in out


def test_every_pruning_method_is_listed(capsys):
    assert main(["methods"]) == 0
    cells = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    rows = [row[1].strip() for row in cells]
    assert {"twig", *METHODS} - {"random", "fitprune"} <= set(rows)
    assert {"random", "fitprune"} <= {row.partition(":")[0] for row in rows}
    needs = {row[1].strip(): row[3].strip() for row in cells}
    assert needs["twig"].startswith("a trained twig")
    assert needs["random"].startswith(needs["deep:N"])
    assert "trained twig" not in needs["random"]
