"""Load a base, its processor and a twig by name, on a device and in a data type."""

from os import PathLike
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from twigvlm.errors import TwigVLMError, is_out_of_memory
from twigvlm.model import TwigVLM

SAPLING = "sapling"
"""Name of the embedded default model."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_twig(name: str) -> str | None:
    """The twig that comes with a base: Sapling's. None: no twig does."""
    if name != SAPLING:
        return None
    from twigvlm import sapling

    return str(sapling.twig_path())


def load_base(name: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """An unmodified Hugging Face model in evaluation mode, and its processor.

    Args:
        name: "sapling", a Hugging Face id, or a directory.
        dtype: "float32", "bfloat16" or "float16"; "auto": as saved, or for Sapling whichever is fastest on this device.
        device: a torch device; "auto": a GPU if there is one.

    Raises:
        TwigVLMError: the model cannot be loaded as a whole, or the dtype or device is unknown or unavailable.
    """
    number_format = _dtype(dtype)
    where = _device(device)
    if name == SAPLING:
        from twigvlm import sapling

        base, processor = sapling.load(dtype=number_format or sapling.fast_dtype(where))
    else:
        try:
            base, found = AutoModelForImageTextToText.from_pretrained(
                name, dtype=number_format or "auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
            processor = AutoProcessor.from_pretrained(name)
        except Exception as error:  # whatever transformers stumbles over in files that are not what they should be
            if is_out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise TwigVLMError(
                f"model {name!r}: cannot be loaded ({reason}); give 'sapling', a Hugging Face id or a directory of a "
                "vision-language model with its processor"
            ) from error
        _check_weights(name, base, found)
    return base.to(where).eval(), processor


def load(
    name: str, twig: str | PathLike[str] | None, dtype: str = "auto", device: str = "auto"
) -> tuple[Any, Any, TwigVLM | None]:
    """A base and its processor as from `load_base`, and the base with a twig.

    Args:
        name: name of the base, as for `load_base`.
        twig: directory or hub id of the twig; None: only the base.
        dtype: data type of base and twig.
        device: device of both.

    Raises:
        TwigVLMError: the base or the twig cannot be loaded.
    """
    base, processor = load_base(name, dtype, device)
    return base, processor, None if twig is None else TwigVLM.from_pretrained(base, twig)


def without_twig(base: Any, exits: bool) -> TwigVLM:
    """A TwigVLM without a trained twig, for pruning methods and ways to draft that need none.

    Args:
        base: the Hugging Face model.
        exits: whether it drafts by early exit, after a quarter of its layers.
    """
    layers = base.config.get_text_config().num_hidden_layers
    return TwigVLM.without_twig(base, max(1, layers // 4) if exits else 0)


def _check_weights(name: str, base: Any, found: dict[str, Any]) -> None:
    """Refuse a base some of whose weights transformers drew at random: of a file that lacks them or has them in another size.

    Args:
        name: name of the base.
        base: as it was loaded.
        found: from transformers' `output_loading_info`.
    """
    other_size = {key for key, *_ in found["mismatched_keys"]}
    drawn = [key for key, _ in base.named_parameters() if key in other_size or key in found["missing_keys"]]
    if drawn:
        raise TwigVLMError(
            f"model {name!r}: lacks {len(drawn)} weights, or has them in another size than its config says, {drawn[0]!r} "
            "first; download it again, or save it again with its config"
        )


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in _DTYPES:
        raise TwigVLMError(f"dtype {name!r}: is not a data type for weights; choose float32, bfloat16, float16 or auto")
    return _DTYPES[name]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise TwigVLMError(f"device {name!r}: is not available here; choose cpu or auto") from None
    return device
