"""Shapes in signatures are checked in tests only."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("twigvlm", "beartype.beartype")

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("default")
