import pytest
from PIL import Image

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.config import TwigConfig
from twigvlm.model import TwigVLM


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory):
    """A tiny random base with its processor, as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("base")
    model = tiny_llava()
    model.save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def twig_directory(tmp_path_factory):
    """A fresh twig on that base."""
    path = tmp_path_factory.mktemp("twig")
    TwigVLM.grow(tiny_llava(), TwigConfig(trunk_layers=2, twig_layers=2, final_wipe=5)).save_pretrained(path)
    return path


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.radial_gradient("L").resize((48, 32)).save(path)
    return path


@pytest.fixture
def arguments(picture, base_directory):
    basic = {"image": picture, "prompt": "What is it?", "model": base_directory, "dtype": "float32", "device": "cpu"}

    def build(**changes):
        options = {**basic, "max-new-tokens": 12, **changes}
        words = ["generate"]
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

    return build


@pytest.fixture
def refused(capsys):
    """Run the command line on bad input: exit code 2, nothing on stdout, one line on stderr, which is returned."""
    from twigvlm.cli.main import main

    def run(*arguments, words=()):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("twigvlm: error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        for word in words:
            assert word in err
        return err

    return run
