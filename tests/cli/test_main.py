import subprocess
import sys

import pytest

import twigvlm
from twigvlm.cli.main import main


def python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("command", [[], ["generate"], ["demo"], ["train", "stage1"], ["train", "stage2"]])
def test_help_comes_from_the_dataclasses(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    expected = {"": "subcommands", "generate": "--retain", "demo": "--runs", "trainstage1": "--trunk-layers"}
    expected["trainstage2"] = "--group"
    assert expected["".join(command)] in out


def test_help_is_quick():
    done = python(
        "import sys\nfrom twigvlm.cli.main import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'numpy', 'PIL'} & sys.modules.keys()\nassert not slow, slow"
    )
    assert done.returncode == 0, done.stderr


def test_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "twigvlm", "generate", "--image", "none.png", "--prompt", "What?"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "twigvlm: error: image 'none.png': no such file; give the path of an existing image file\n"


def test_public_names():
    assert all(hasattr(twigvlm, name) for name in twigvlm.__all__)
    assert set(twigvlm.__all__) <= set(dir(twigvlm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = twigvlm.nothing


@pytest.mark.parametrize(
    ("option", "words"),
    [("--twig-layers=0", "twig_layers=0: must be 1 or more"), ("--batch-size=0", "batch_size=0: must be 1 or more")],
)
def test_bad_values_are_one_line_too(option, words, refused):
    refused("train", "stage1", "--data", "x", "--out", "y", option, words=[words])
