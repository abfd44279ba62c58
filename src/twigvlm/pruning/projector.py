"""A projector that was tuned for a pruning method, in a directory of its own: the base keeps the one that it has."""

from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from twigvlm.errors import TwigVLMError

WEIGHTS = "projector.safetensors"


def tuned_projector(folder: str, projector: nn.Module) -> dict[str, Tensor]:
    """A tuned projector's weights by their names, in the number format and on the device of the base's projector.

    Args:
        folder: directory that `twigvlm train visionzip` has written.
        projector: the base's projector.

    Raises:
        TwigVLMError: there is no such file, it is broken, or it belongs to another base.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise TwigVLMError(f"projector {folder!r}: {WEIGHTS} is not there; train one with 'twigvlm train visionzip'")
    weights, mine = _read(path, path.stat().st_mtime_ns), projector.state_dict()
    if {name: weight.shape for name, weight in weights.items()} != {
        name: weight.shape for name, weight in mine.items()
    }:
        raise TwigVLMError(
            f"projector {folder!r}: belongs to another base, whose projector has other weights; train one for this base"
        )
    return {name: weight.to(mine[name]) for name, weight in weights.items()}


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise TwigVLMError(f"{path}: truncated or not a safetensors file ({error}); get the file again") from None
