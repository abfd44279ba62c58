import pytest
import torch

from tests.tiny import tiny_llava
from tests.tiny_processor import tiny_processor
from tests.training.runs import make_samples
from twigvlm.config import TwigConfig
from twigvlm.model import TwigVLM
from twigvlm.training.data.dataset import ConversationDataset


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture
def samples():
    return make_samples()


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


@pytest.fixture
def make_policy(make_model):
    def make(dtype=None, **options):
        torch.manual_seed(0)
        return make_model(dtype, pruning_head=True, final_wipe=5, **options)

    return make
