import pytest
from PIL import Image

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from twigvlm.config import TwigConfig
from twigvlm.model import TwigVLM
from twigvlm.training.data import ConversationDataset


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture
def samples():
    """Eight samples of one or two turns; the answers follow from the pictures' colours."""
    made = []
    for number, colour in enumerate(["red", "green", "blue", "white"] * 2):
        turns = [("human", "<image>\nWhat colour?"), ("gpt", f"It is {colour}.")]
        if number % 2:
            turns += [("human", "Sure?"), ("gpt", "Yes.")]
        conversations = [{"from": speaker, "value": value} for speaker, value in turns]
        made.append({"id": f"s{number}", "image": Image.new("RGB", (20, 20), colour), "conversations": conversations})
    return made


@pytest.fixture
def dataset(samples, processor):
    return ConversationDataset([dict(sample) for sample in samples], processor)


@pytest.fixture
def make_model():
    def make(dtype=None, **options):
        base = tiny_llava() if dtype is None else tiny_llava().to(dtype)
        tokens = options.pop("draft_token_ids", None)
        return TwigVLM.grow(base, TwigConfig(**{"trunk_layers": 1, "twig_layers": 2, **options}), tokens)

    return make
