"""The code blocks of the documents, what their scripts call, and a tiny model to run them on.

The model has Sapling's numbers of visual tokens and layers.
"""

import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from tests.tiny import VOCABULARY, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.config import TwigConfig
from twigvlm.inputs import build_inputs, user_turn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORDED = """
command_not_found_handle() {
  printf '%s\\x1f' "$@" >&3; printf '\\x1e' >&3
  if [ "$1" = mkdir ]; then "$MKDIR" "${@:2}"; fi
}
"""
"""What bash reads before a script that finds no programs: each is noted with its arguments, and none but mkdir runs."""
SIDE, LAYERS = 24, 30
"""As Sapling's, so that the budgets of the documents are possible."""
SHAPE = TwigConfig(trunk_layers=1, twig_layers=1, final_wipe=24, pruning_head=True)


def blocks(page, language):
    """The text of each code block of a page in that language, in order, without the indentation of lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return ["\n".join(line[len(indent) :] for line in text.splitlines()) for indent, text in found]


def shell_commands(page):
    """Each command of the page's shell blocks as words, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def pages_with(language):
    """Pages that have code in that language, by their paths."""
    return {name_of(page): page for page in PAGES if blocks(page, language)}


def name_of(page):
    """The path of a page."""
    return page.relative_to(ROOT).as_posix()


def script_calls(page, folder):
    """Each program that the page's scripts would start, as words: loops, functions and variables are bash's own.

    Args:
        page: its `sh` blocks are one script.
        folder: where the script runs.
    """
    bash, log = shutil.which("bash"), folder / "calls"
    script = f"exec 3>>calls\n{RECORDED}\n" + "\n".join(blocks(page, "sh"))
    environment = {
        "PATH": str(folder / "nothing"),
        "HOME": str(folder),
        "MKDIR": shutil.which("mkdir"),
        "LC_ALL": os.environ.get("LC_ALL", "C"),
    }
    done = subprocess.run(
        [bash, "-c", script], cwd=folder, env=environment, text=True, capture_output=True, timeout=60, check=False
    )
    assert not done.stderr, done.stderr
    return [call.split("\x1f")[:-1] for call in log.read_text().split("\x1e")[:-1]]


@cache
def tiny_base():
    """A base whose answers are one token long, whatever length is asked for."""
    base = tiny_llava(layers=LAYERS, side=SIDE, context=2048)
    base.generation_config.eos_token_id = list(range(VOCABULARY))
    return base


@cache
def tiny_parts():
    """That base, its processor, and inputs that show a picture."""
    processor = tiny_processor(side=SIDE)
    turn = user_turn("What is it?", Image.radial_gradient("L"))
    return tiny_base(), processor, build_inputs(processor, [[turn]], torch.device("cpu"), torch.float32)
