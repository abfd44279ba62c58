from pathlib import Path

import pytest

from tests.tiny import prompt, tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.config import TwigConfig
from twigvlm.evaluation.questions import Question, Questions
from twigvlm.evaluation.variants import answer_all, make_variants
from twigvlm.model import TwigVLM


@pytest.fixture
def base():
    return tiny_llava(deep_scale=0.03, from_layer=2)


@pytest.fixture
def model(base):
    return TwigVLM.grow(base, TwigConfig(2, 2, final_wipe=5))


@pytest.fixture
def tokenizer():
    return tiny_processor().tokenizer


def inputs_of(question):
    return prompt(int(question.id))


@pytest.fixture
def questions(model, tokenizer):
    """Questions that the base answers right, one of them a description."""

    def right(number):
        ids = answer_all(model, prompt(number), make_variants(model, ["twig"], [10]), 6)["none"].ids
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    picture = Path("none.png")
    items = [Question(str(number), picture, "?", right(number), "place", number == 2) for number in range(3)]
    items.append(Question("3", picture, "?", "…", "description", objects=("cat",)))
    return Questions(tuple(items), "test", {"cat": (right(3)[0].lower(),), "dog": ("dog",)})
