from twigvlm.base.families import FAMILIES, LANGUAGE_MODELS
from twigvlm.cli.main import main


def test_every_family_and_language_model_is_listed(capsys):
    assert main(["families"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "│" in line]
    for entry in (*FAMILIES, *LANGUAGE_MODELS):
        assert any(entry.model_type in row.split("│")[1 if entry in LANGUAGE_MODELS else 2] for row in rows)
    assert "images, videos" in out
