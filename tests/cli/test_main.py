import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import twigvlm
from twigvlm.cli.commands import COMMANDS
from twigvlm.cli.main import main
from twigvlm.cli.parsing import describe
from twigvlm.config import PruningConfig, SpeculationConfig

SUBCOMMANDS = [
    "generate", "demo", "inspect", "train stage1", "train stage2", "train visionzip", "train fitprune",
    "evaluate accuracy", "evaluate sweep", "evaluate speed",
    "evaluate drafts", "evaluate batches", "evaluate exactness", "families", "methods", "convert", "export",
    "serve", "batch", "evaluate relacc", "doctor", "compare", "figures times", "figures speeds", "figures samples",
    "figures attention", "figures drafts",
]  # fmt: skip
WITHOUT_BASE = (
    "families",
    "methods",
    "doctor",
    "evaluate relacc",
    "figures times",
    "figures speeds",
    "figures samples",
)


def python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def help_of(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def usage_error(words, capsys):
    """Exit code 2, nothing on stdout, one line and the usage on stderr: the line is returned, and the usage."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    line, usage = err.splitlines()
    assert line.startswith("twigvlm: error: ")
    assert usage.startswith("usage: twigvlm ")
    return line.removeprefix("twigvlm: error: "), usage


def commands_in(kind):
    """The dataclasses that the commands are made of."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield kind
        for inner in get_type_hints(kind, include_extras=True).values():
            yield from commands_in(inner)
    for inner in get_args(kind):
        yield from commands_in(inner)


OPTIONS = sorted(
    {
        (command.__name__, name): describe(command, name)
        for command in commands_in(COMMANDS)
        for name, kind in get_type_hints(command).items()
        if name in {field.name for field in dataclasses.fields(command)} and not list(commands_in(kind))
    }.items()
)
"""Options with what they say."""


@pytest.mark.parametrize("command", ["", *SUBCOMMANDS])
def test_help_comes_from_the_dataclasses(command, capsys):
    expected = {"": "subcommands", "generate": "--retain", "demo": "--runs", "train stage1": "--trunk-layers"}
    assert expected.get(command, "--help") in help_of(command, capsys)


def test_help_has_whole_lines_and_says_what_left_out_options_stand_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    shown = "".join(help_of(command, capsys) for command in SUBCOMMANDS)
    assert "default: None" not in shown
    assert "default: )" not in shown
    assert "{None,none" not in shown
    for option, text in OPTIONS:
        for sentences in re.split(r"None(?: given)?: [^.]+\.", text):
            assert sentences.strip() in shown, option


def test_each_option_is_described_and_those_of_the_method_only_once():
    assert not [option for option, text in OPTIONS if not text]
    for config in (PruningConfig, SpeculationConfig):
        for field in dataclasses.fields(config):
            said = {
                text
                for (command, name), text in OPTIONS
                if name == field.name
                and command not in ("TwigConfig", "Convert", "ProjectorConfig", "CalibrateSchedule")
            }
            assert len(said) <= 1, field.name


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
    *progress, error = done.stderr.splitlines()
    assert error == "twigvlm: error: image 'none.png': no such file; give the path of an existing image file"
    assert all(line.endswith(" so far") for line in progress)  # on a busy machine


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"twigvlm {twigvlm.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_the_commands(capsys, shell):
    with pytest.raises(SystemExit) as caught:
        main(["--tyro-print-completion", shell])
    assert not caught.value.code
    script = capsys.readouterr().out
    assert all(command in script for command in ("generate", "evaluate", "doctor", "--retain"))


def test_a_shell_whose_completion_needs_another_package_is_told_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--tyro-print-completion", "tcsh"]) == 2
    assert capsys.readouterr().err == (
        "twigvlm: error: completion for this shell needs one more package; run: pip install shtab\n"
    )


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


@pytest.mark.parametrize(
    ("words", "line", "command"),
    [
        ("", "no subcommand given; expected one of {generate, ", ""),
        ("fly", "unrecognized options: fly", ""),
        ("evaluate", "no subcommand given; expected one of {accuracy, ", "evaluate"),
        ("evaluate sped", "unrecognized options: sped", "evaluate"),
        ("evaluate speed", "required: --questions PATH, --output PATH", "evaluate speed"),
        ("evaluate speed --question q --output o", "required: --questions PATH; unrecognized: --question, q", "evaluate speed"),
        ("convert", "required: SOURCE, OUT, --model STR", "convert"),
        ("convert a b", "required: --model STR", "convert"),
        ("export sglang out", "to 'sglang': must be one of vllm", "export"),
        ("generate", "required: --prompt STR or --prompts PATH", "generate"),
        ("generate --prompt a --prompts b", "required: --prompt STR or --prompts PATH; give one of them", "generate"),
        ("generate --prompt a --tempurature 1", "unrecognized options: --tempurature, 1; perhaps you meant --temp", "generate"),
        ("generate --prompt a --dtype int3", "--dtype 'int3': must be one of auto, bfloat16, float16, float32", "generate"),
        ("generate --prompt a --speculate fast", "--speculate 'fast': must be one of auto, chain, exit, loo", "generate"),
        ("generate --prompt a --top-p all", "--top-p FLOAT: 'all' does not fit", "generate"),
        ("generate --prompt a --max-new-tokens ten", "--max-new-tokens INT: 'ten' does not fit", "generate"),
        ("generate --prompt", "missing value for argument '--prompt'", "generate"),
        ("generate --prompt a --image b --image=c", "--image: given more than once", "generate"),
        ("evaluate sweep --questions a --output b --budgets 64 --retain 32", "--budgets: given more than", "evaluate sweep"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("columns", ["40", "200"])
def test_usage_errors_are_one_line_and_the_usage_of_the_command(words, line, command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    said, usage = usage_error(words.split(), capsys)
    assert said.startswith(line)
    assert usage.startswith(f"usage: twigvlm {command}".rstrip() + " [-h]")


def test_a_source_that_is_no_directory_is_refused_before_the_base_is_loaded(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("twigvlm.loading.load_base", None)
    source, out = tmp_path / "none", tmp_path / "out"
    refused("convert", source, out, "--model", "sapling", words=[f"source '{source}': no such directory"])


def test_an_option_given_again_replaces_one_value(refused):
    refused(
        "generate", "--prompt", "a", "--image", "x.png", "--max-new-tokens", "3", "--max-new-tokens", "0", words=["=0"]
    )


@pytest.mark.parametrize("command", [c for c in SUBCOMMANDS if c not in WITHOUT_BASE])
def test_ctrl_c_ends_a_command_with_one_line(command, tmp_path, capsys, monkeypatch):
    """Wherever it comes; here, while the base loads."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("twigvlm.loading.load_base", interrupted)
    monkeypatch.chdir(tmp_path)
    record = '{"questions": [{"id": "1", "image": "i.png", "question": "a", "answer": "b", "kind": "c"}]}'
    Path("i.png").touch()
    Path("questions.json").write_text(record.replace('"c"', '"description"'))
    Path("samples.json").write_text(
        '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]'
    )
    Path("source").mkdir()
    Path("batch.jsonl").write_text('{"custom_id": "a", "body": {}}')
    twig = Path(twigvlm.__file__).parent / "sapling" / "twig"
    if command in ("serve", "batch"):
        pytest.importorskip("uvicorn")
    options = {
        "generate": "--prompt a",
        "demo": "",
        "inspect": "",
        "train": f"--data samples.json --out out{f' --start {twig}' if 'stage2' in command else ''}",
        "export": "vllm out --base base",
        "evaluate": "--questions questions.json --output out",
        "compare": "--questions questions.json --output out",
        "figures": "--questions questions.json",
        "convert": "source out --model sapling",
        "serve": "--port 0",
        "batch": "batch.jsonl out",
    }
    assert main([*command.split(), *options[command.split()[0]].split()]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("twigvlm: interrupted; ")
    assert "again" in err or "continue" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["generate", "--help"], ["--version"], ["families"]], ids=str)
def test_a_reader_that_leaves_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "twigvlm", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to write to")
@pytest.mark.parametrize("words", [["generate", "--help"], ["--version"], ["families"]], ids=str)
def test_a_full_disk_ends_in_one_line(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "twigvlm", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "twigvlm: error: output: no space left; make room, and run the command again to start over\n"


def test_a_closed_stdout_is_no_error():
    words = [sys.executable, "-m", "twigvlm", "families"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_without_greek_letters_shows_the_help():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "twigvlm", "evaluate", "drafts", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "--thresholds" in done.stdout
