"""The code blocks of the documents, and a tiny model of Sapling's numbers of visual tokens and layers to run them on."""

import re
import shlex
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from tests.tiny import VOCABULARY, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.config import TwigConfig
from twigvlm.inputs import build_inputs, user_turn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    """Pages that have code in that language, by their names."""
    return {page.name: page for page in PAGES if blocks(page, language)}


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
