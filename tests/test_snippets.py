"""The code in the documents runs: Python on a tiny model, shell commands as far as parsing goes."""

import ast
import json
import re
import sys
import tempfile
from unittest.mock import MagicMock

import pytest
import tomllib
import transformers
from PIL import Image

import twigvlm.sapling
from recipes.docs import notebooks
from tests.snippets import PAGES, ROOT, SHAPE, blocks, name_of, pages_with, script_calls, shell_commands, tiny_parts
from twigvlm.cli.commands import COMMANDS, DESCRIPTION
from twigvlm.cli.parsing import parse
from twigvlm.errors import TwigVLMError
from twigvlm.integrations.lmms_eval.answering import Setting
from twigvlm.model import TwigVLM

OTHERS = {
    "docs/serving.md": ("openai", "ray", "twigvlm.integrations.ray"),
    "docs/vllm.md": ("vllm",),
}
"""Pages whose code needs a server or packages that the tests do not have -> what stands in for them does nothing."""
PROGRAMS = (
    "accelerate",
    "curl",
    "docker",
    "export",
    "hf",
    "make",
    "pip",
    "pytest",
    "python",
    "source",
    "torchrun",
    "twigvlm",
    "vllm",
)
SHELL = [(name_of(page), words) for page in PAGES for words in shell_commands(page)]


@pytest.fixture
def _tiny(monkeypatch, tmp_path):
    """Whatever is loaded is tiny; pictures are in the working directory, and nothing goes to the hub."""
    base, processor, _ = tiny_parts()

    def grow(cls, model, path, **_):
        return cls.grow(model, SHAPE)

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: base)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    monkeypatch.setattr(twigvlm.sapling, "load", lambda *_, **__: (base, processor))
    monkeypatch.setattr(TwigVLM, "from_pretrained", classmethod(grow))
    monkeypatch.setattr(TwigVLM, "push_to_hub", lambda *_, **__: "page")
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").save(tmp_path / "picture.png")


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("name", sorted(pages_with("python")))
def test_python_code_runs(name, monkeypatch, capsys):
    base, processor, inputs = tiny_parts()
    for module in OTHERS.get(name, ()):
        monkeypatch.setitem(sys.modules, module, MagicMock())
    model = TwigVLM.grow(base, SHAPE)
    names = {"TwigVLM": TwigVLM, "base": base, "processor": processor, "model": model, "inputs": inputs}
    names["client"] = MagicMock()
    for number, block in enumerate(blocks(pages_with("python")[name], "python")):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


NOTEBOOKS = sorted(notebooks.FOLDER.glob("*.ipynb"))
SMALL = {"STEPS, SCENES = 30, 32": "STEPS, SCENES = 1, 2", "QUESTIONS, BUDGET = 6, 64": "QUESTIONS, BUDGET = 1, 64"}
"""What makes a notebook long, and what is run here instead."""


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = {}
    for number, source in enumerate(notebooks.code(path)):
        for long, short in SMALL.items():
            source = source.replace(long, short)
        exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
    assert capsys.readouterr().out


def test_notebooks_hold_no_outputs_and_what_is_made_small_is_there():
    assert len(NOTEBOOKS) == 4
    text = "".join("\n".join(notebooks.code(path)) for path in NOTEBOOKS)
    assert all(long in text for long in SMALL)
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_code_imports_what_is_there(page):
    """Also from modules that stand-ins replace above."""
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("twigvlm."):
                path = ROOT / "src" / node.module.replace(".", "/")
                source = (
                    path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
                ).read_text()
                for alias in node.names:
                    assert re.search(rf"^(def |class |from .*import .*)?\b{alias.name}\b", source, re.MULTILINE), (
                        alias.name
                    )


def check_options(words):
    """Have the command line's parser read what a command gives to `twigvlm`; False if it gives nothing."""
    program = words[0].rpartition("/")[2]
    if program == "twigvlm":
        arguments = words[1:]
    elif (
        program in ("accelerate", "python", "torchrun")
        and "twigvlm" in words
        and words[words.index("twigvlm") - 1] == "-m"
    ):
        arguments = words[words.index("twigvlm") + 1 :]
    else:
        return False
    if not {"--version", "--help", "--tyro-print-completion"} & set(arguments):
        parse(COMMANDS, DESCRIPTION, arguments)
    return True


@pytest.mark.parametrize(
    ("page", "words"), SHELL, ids=lambda each: each if isinstance(each, str) else " ".join(each)[:60]
)
def test_commands_exist_and_take_these_options(page, words):
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program = words[0].rpartition("/")[2]
    assert program in PROGRAMS
    if check_options(words):
        return
    if "-m" in words and program != "pytest":
        path = ROOT / words[words.index("-m") + 1].replace(".", "/")
        assert words[words.index("-m") + 1] == "vllm.entrypoints.openai.api_server" or path.with_suffix(".py").exists()
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            for extra in re.findall(r"(?:^|[./]|twigvlm)\[([\w,]+)\]", word):
                assert set(extra.split(",")) <= extras.keys()


@pytest.mark.parametrize("name", sorted(pages_with("sh")))
def test_scripts_call_commands_that_exist_with_these_options(name, tmp_path):
    """Blocks with functions, loops and variables: bash runs them whole, with every program replaced by a recorder."""
    calls = script_calls(pages_with("sh")[name], tmp_path)
    assert [words for words in calls if check_options(words)]
    for words in calls:
        if "--model_args" in words:
            given = dict(pair.split("=", 1) for pair in words[words.index("--model_args") + 1].split(","))
            check_model_arguments(given)


MODEL = (ROOT / "src" / "twigvlm" / "integrations" / "lmms_eval" / "model.py").read_text()
MODEL_ARGUMENTS = {
    argument.arg
    for node in ast.walk(ast.parse(MODEL))
    if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    for argument in node.args.args
}
"""What lmms-eval may pass to the model, which cannot be imported without it."""


def check_model_arguments(given):
    """What a command gives to the plug-in of lmms-eval is known, and fits together."""
    here = {name: given[name] for name in ("method", "retain", "speculate") if name in given}
    here.setdefault("method", "twig" if "retain" in given else "none")
    further = {name: float(value) for name, value in given.items() if name not in MODEL_ARGUMENTS}
    Setting(**here, drafting=further)


def test_what_scripts_say_wrongly_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '```sh\nask() { twigvlm generate "$@" --no-such-option; }\nfor P in a b; do ask --prompt $P; done\n```\n'
    )
    calls = script_calls(page, tmp_path)
    assert calls == [["twigvlm", "generate", "--prompt", prompt, "--no-such-option"] for prompt in "ab"]
    with pytest.raises(SystemExit):
        check_options(calls[0])
    with pytest.raises(TwigVLMError, match="unknown"):
        check_model_arguments({"pretrained": "sapling", "drafts": "1"})


@pytest.mark.parametrize("name", sorted(pages_with("json")))
def test_json_is_json(name):
    for block in blocks(pages_with("json")[name], "json"):
        json.loads(block)


def test_the_documents_were_read():
    assert len(SHELL) > 40
    assert {"README.md", "docs/index.md", "docs/python.md", "docs/adding-a-method.md"} <= pages_with("python").keys()
    assert {"CONTRIBUTING.md", "docs/results/accuracy.md", "docs/serving.md"} <= {page for page, _ in SHELL}
