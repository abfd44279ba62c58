"""lmms-eval: run its tasks with any base, twig, pruning method, budget and way to draft, by `--model twigvlm`.

lmms-eval finds `manifest` by the entry point group `lmms_eval.models` and calls it each time it starts. If that fails, it only
warns, and then knows no plug-in at all. So this module imports neither torch nor transformers.
"""

from pathlib import Path
from typing import Any

from twigvlm.errors import TwigVLMError

TASKS = Path(__file__).parent / "tasks"
"""Folder of additional tasks that lmms-eval lacks, for its `--include_path`."""
NEEDS = "lmms-eval is not installed; run: pip install 'twigvlm[lmms-eval]'"


def manifest() -> Any:
    """The `ModelManifest` that tells lmms-eval about the model `twigvlm`.

    Raises:
        TwigVLMError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lmms_eval":
            raise
        raise TwigVLMError(NEEDS) from None
    return ModelManifest("twigvlm", chat_class_path=f"{__name__}.model.TwigVLMChat")
