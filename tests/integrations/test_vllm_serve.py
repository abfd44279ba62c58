"""Exports that `twigvlm serve --engine vllm` finds again."""

import pytest

from twigvlm import TwigVLMError
from twigvlm.cli.export import Commands, Export
from twigvlm.cli.serve_vllm import export
from twigvlm.cli.serving import ServiceOptions


def test_an_export_that_was_moved_is_refused(monkeypatch, tmp_path):
    made = []

    def write(asked):
        made.append(asked.base)
        return Commands(str(asked.out), {}, ["vllm", "serve", str(asked.base)], [])

    monkeypatch.setattr(Export, "write", write)
    options = ServiceOptions(model="base", twig="twig")
    old, new, link = (tmp_path / name for name in ("old", "new", "link"))
    old.mkdir()
    link.symlink_to(old)
    served = [export(options, folder) for folder in (old, old, link)]
    assert [command for _, command in served] == [["vllm", "serve", str(old / "base")]] * 3
    old.rename(new)
    with pytest.raises(
        TwigVLMError, match=r"new': was made as '.*old', .*; move it back there, or name another"
    ) as refused:
        export(options, new)
    assert "\n" not in str(refused.value)
    assert made == [old / "base"]


@pytest.mark.parametrize("text", ["", "[]", '{"of": {}}', '{"of": [], "serve": ["vllm", "serve", "base"]}'])
def test_an_export_whose_note_is_damaged_is_refused(tmp_path, text):
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(TwigVLMError, match=r"its export\.json cannot be read \(.+\); name another directory"):
        export(ServiceOptions(model="base", twig="twig"), tmp_path)
