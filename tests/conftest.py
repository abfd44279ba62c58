"""What all tests share: shapes in signatures are checked in tests, and only there."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = (
    "1"  # of the processes that tests start too: one core each is the fastest for tiny models
)

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

import tests.typecheck  # the hook below names it and expects it to be there

# Not config.py: it checks values itself, and its messages are under test.
checked = (
    "base",
    "checkpoints",
    "engine",
    "evaluation",
    "hf",
    "kv",
    "model",
    "pruning",
    "speculation",
    "training",
    "twig",
)
install_import_hook([f"twigvlm.{name}" for name in checked], f"{tests.typecheck.__name__}.check")
# Building a tiny model takes a moment on a busy machine: no deadline, and no complaint about slow examples.
slow = [HealthCheck.too_slow]
settings.register_profile("default", deadline=None, derandomize=True, max_examples=20, suppress_health_check=slow)
settings.load_profile("default")


@pytest.fixture(autouse=True, scope="session")
def _a_cache_of_their_own(tmp_path_factory):
    """Tests leave no calibration on this machine, and find none."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _the_same_in_any_order():
    """Fresh P-Heads draw from the global generator, and a tiny one can be born with every gate shut."""
    torch.manual_seed(0)
    tests.typecheck.begin_test()


def pytest_configure(config):
    if not config.getoption("all_shapes"):
        tests.typecheck.sample()


def pytest_addoption(parser):
    parser.addoption("--all-shapes", action="store_true", help="check the shapes of every call, not of a part of them")
    parser.addoption("--draws", type=int, default=1000, help="sampled answers per seed in tests of a distribution")
    parser.addoption("--seeds", type=int, default=1, help="seeds in tests of a distribution")
    parser.addoption(
        "--family", action="append", help="run the tests that go through all families for this one alone (repeatable)"
    )


def pytest_collection_modifyitems(config, items):
    """Drop the cases of the families that --family does not name."""
    chosen = config.getoption("family")
    if chosen is None:
        return
    from tests.families import TINY

    if unknown := set(chosen) - TINY.keys():
        raise pytest.UsageError(f"--family {', '.join(sorted(unknown))}: choose from {', '.join(TINY)}")
    others = TINY.keys() - set(chosen)
    dropped = [item for item in items if hasattr(item, "callspec") and item.callspec.params.get("name") in others]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]
