"""A twig on disk: its weights (safetensors), its config with a fingerprint of its base, its training record, a model card."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twigvlm import compat
from twigvlm.base.vlm import BaseVLM
from twigvlm.base.weights import is_quantised
from twigvlm.checkpoints.card import MARK, model_card
from twigvlm.checkpoints.hub import fetch, is_hub_id
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.files import replacing, writing
from twigvlm.twig.block import Twig

WEIGHTS = "twig_model.safetensors"
CONFIG = "twig_config.json"
RECORD = "training.json"
CARD = "README.md"
FILES = [WEIGHTS, CONFIG, RECORD]
"""All that a twig needs."""
DIVERGED = "the training diverged, train the twig again with a lower learning rate"
"""What to do about weights that are not finite."""
_ENTRY = {
    "stage": str,
    "samples": int,
    "steps": int,
    "final": dict,
    "settings": dict,
}  # what each record of a training has
_DIMENSIONS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def save(base: BaseVLM, twig: Twig, path: str | PathLike[str], name: str | None = None) -> None:
    """Write a twig to a directory; each file is replaced whole or not at all. A model card that is not ours stays.

    Args:
        base: its base.
        twig: the twig.
        path: the directory.
        name: name of the twig, for its card; None: the directory's.

    Raises:
        TwigVLMError: there is no twig, its training has diverged, or the directory cannot be written to.
    """
    folder = Path(path)
    if twig.is_stand_in:
        raise TwigVLMError(f"{folder}: not saved, for this model has no twig; grow one with TwigVLM.grow")
    check_finite(twig.state_dict(), f"{folder}: not saved")
    if folder.exists() and not folder.is_dir():
        raise TwigVLMError(f"{folder}: is a file; name a directory for the twig")
    with writing(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in twig.state_dict().items()}
    shape = dataclasses.asdict(twig.config)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "twig": json.dumps(shape)})
    origin = str(base.model.name_or_path)
    source = origin if is_hub_id(origin) else None  # a directory's name tells nothing elsewhere
    record = {"twig": shape, "base": {"name": source, **fingerprint(base)}}
    _write(folder / CONFIG, _json(record))
    if twig.record:
        _write(folder / RECORD, _json(twig.record))
    else:
        (folder / RECORD).unlink(missing_ok=True)  # of another twig that was here
    card = folder / CARD
    if not card.is_file() or MARK in card.read_text(encoding="utf-8", errors="replace"):
        _write(card, model_card(twig, name or folder.absolute().name, source))


def load(base: BaseVLM, path: str | PathLike[str], revision: str | None = None, token: str | None = None) -> Twig:
    """Read a twig onto its base, in the base's dtype and on its device.

    Args:
        base: the base.
        path: a directory, or a hub id.
        revision: branch, tag or commit of a hub id.
        token: for the hub.

    Raises:
        TwigVLMError: a file is missing or broken, keys or shapes differ from the config's, its training has diverged, the
            base is another one, or the hub does not have it.
    """
    folder = fetch(path, FILES, revision, token)
    config, expected = _read_config(folder / CONFIG)
    difference = compare(expected, fingerprint(base, list(expected["samples"])))
    if difference:
        raise TwigVLMError(f"{folder}: this twig grew on another base ({difference}); load the base it was trained on")
    state = _read_weights(folder / WEIGHTS, config)
    ids = state.get("draft_token_ids")
    if config.draft_vocabulary is not None and ids is None:
        raise TwigVLMError(f"{folder / WEIGHTS}: missing keys draft_token_ids; get the file again")
    twig = Twig(base, config, None if config.draft_vocabulary is None else ids, fresh=False)
    _check_keys(folder / WEIGHTS, state, twig.state_dict())
    twig.load_state_dict(state)
    if twig.norm.weight.dtype == torch.float16:
        remedy = "they exceed the range of float16, load the base in bfloat16 or float32"
        check_finite(twig.state_dict(), str(folder), remedy)
    if (folder / RECORD).is_file():
        twig.record = _read_record(folder / RECORD)
    return twig


def check(path: str | PathLike[str], revision: str | None = None, token: str | None = None) -> TwigConfig:
    """Read a twig without its base, as far as it can be judged without one; arguments as in `load`.

    Raises:
        TwigVLMError: a file is missing or broken, its training has diverged, or the hub does not have it.
    """
    folder = fetch(path, FILES, revision, token)
    config, _ = _read_config(folder / CONFIG)
    _read_weights(folder / WEIGHTS, config)
    return config


def digest(folder: Path) -> str:
    """Twelve characters that change with a twig's weights, and with what may be tuned in its config.

    Args:
        folder: directory of the twig.
    """
    whole = hashlib.sha256((folder / WEIGHTS).read_bytes())
    # K_f and φ may be tuned in the config: no weight tells of them.
    whole.update(json.dumps(dataclasses.asdict(check(folder)), sort_keys=True).encode())
    return whole.hexdigest()[:12]


def check_finite(state: Mapping[str, Tensor], name: str, remedy: str = DIVERGED) -> None:
    """Refuse weights that cannot be computed with.

    Args:
        state: weights by their names.
        name: name of what is refused, for the message.
        remedy: what the user can do about it.

    Raises:
        TwigVLMError: a weight is NaN or infinite.
    """
    broken = [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise TwigVLMError(f"{name}: NaN or infinite values in {broken[0]}{more}; {remedy}")


def fingerprint(base: BaseVLM, names: list[str] | None = None) -> dict[str, Any]:
    """Dimensions of a base, and a few weights of tensors from all over it: cheap, and the same in every dtype.

    Args:
        base: the base. What is quantised of it tells nothing and is left out.
        names: names of the tensors, where the base has them; None: 24 of all.
    """
    dimensions = {name: getattr(base.config, name, None) for name in _DIMENSIONS}
    dimensions["vocab_size"] = base.vocabulary
    whole = {
        compat.uncompiled_name(name): name
        for name, tensor in base.model.named_parameters()
        if tensor.ndim >= 2 and not is_quantised(tensor)
    }
    if names is None:
        ordered = sorted(whole)
        names = [ordered[i] for i in _spread(len(ordered), 24)]
    samples = {}
    for name in sorted(whole.keys() & names):
        path, _, attribute = whole[name].rpartition(".")
        part = base.model.get_submodule(path)
        with compat.present(part):
            flat = getattr(part, attribute).detach().reshape(-1)
            index = torch.tensor(_spread(flat.numel(), 12), device=flat.device)
            samples[name] = [float(f"{value:.6g}") for value in flat[index].float().tolist()]
    return {"model_type": base.model.config.model_type, "dimensions": dimensions, "samples": samples}


def compare(expected: dict[str, Any], actual: dict[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty if nothing does beyond half-precision rounding."""
    if expected["model_type"] != actual["model_type"]:
        return f"model type {expected['model_type']}, this is {actual['model_type']}"
    for name, value in expected["dimensions"].items():
        if actual["dimensions"].get(name) != value:
            return f"{name} {value}, this has {actual['dimensions'].get(name)}"
    shared = expected["samples"].keys() & actual["samples"].keys()  # a quantised base hides some weights
    if not shared:
        return "no weight in common"
    for name in sorted(shared):
        ours, theirs = torch.tensor(expected["samples"][name]), torch.tensor(actual["samples"][name])
        # bfloat16 keeps 8 bits: two roundings differ by at most 2^-8 of a weight, merged updates by that of the scale
        tolerance = (ours.abs() + ours.square().mean().sqrt()) * 2.0**-8
        if ours.shape != theirs.shape or not bool(((ours - theirs).abs() <= tolerance).all()):  # NaN equals nothing
            return f"weights of {name} differ"
    return ""


def _spread(count: int, picks: int) -> list[int]:
    """Up to `picks` indices from 0 to count-1, evenly spaced, ends included."""
    if count <= picks:
        return list(range(count))
    return [round(i * (count - 1) / (picks - 1)) for i in range(picks)]


def _read_config(file: Path) -> tuple[TwigConfig, dict[str, Any]]:
    if not file.is_file():
        raise TwigVLMError(
            f"{file.parent}: no twig here ({CONFIG} is missing); name a directory made by save_pretrained, or a hub id"
        )
    record = _read_json(file)
    try:
        config = TwigConfig(**record["twig"])
        base = record["base"]
        _ = base["model_type"], base["dimensions"].items()
        for values in base["samples"].values():
            if not (values and isinstance(values, list) and all(isinstance(value, float) for value in values)):
                raise TypeError("its samples of the base's weights are no numbers")
    except TwigVLMError as error:
        raise TwigVLMError(f"{file}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise TwigVLMError(f"{file}: not a twig's config ({error}); get the file again or update twigvlm") from None
    return config, base


def _read_record(file: Path) -> list[dict[str, Any]]:
    record = _read_json(file)
    if not isinstance(record, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _ENTRY.items())
        for entry in record
    ):
        raise TwigVLMError(f"{file}: not the record of a twig's trainings; get the file again, or delete it")
    return record


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TwigVLMError(f"{file}: cannot be read ({one_line(error)}); get the file again") from None


def _read_weights(file: Path, config: TwigConfig) -> dict[str, Tensor]:
    if not file.is_file():
        raise TwigVLMError(f"{file.parent}: {WEIGHTS} is missing; get the file again")
    try:
        with safe_open(file, framework="pt") as reader:
            metadata = reader.metadata() or {}
            state = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise TwigVLMError(f"{file}: truncated or not a safetensors file ({error}); get the file again") from None
    # Two files cannot be replaced as one: a save that was cut off between them must not pass for a twig.
    # K_f and φ may be tuned in the config: no weight depends on them.
    tuned = {"final_wipe": config.final_wipe, "final_share": config.final_share}
    try:
        same = "twig" not in metadata or TwigConfig(**{**json.loads(metadata["twig"]), **tuned}) == config
    except (ValueError, TypeError) as error:
        raise TwigVLMError(
            f"{file}: does not say which twig it holds ({one_line(error)}); get the file again or update twigvlm"
        ) from None
    if not same:
        raise TwigVLMError(
            f"{file.parent}: weights and {CONFIG} come from different twigs, because a save was interrupted; save it again"
        )
    check_finite(state, str(file))
    return state


def _check_keys(file: Path, state: dict[str, Tensor], expected: dict[str, Any]) -> None:
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"missing keys {', '.join(missing)}")
    if unexpected := sorted(state.keys() - expected.keys()):
        problems.append(f"unexpected keys {', '.join(unexpected)}")
    for name in sorted(state.keys() & expected.keys()):
        if state[name].shape != expected[name].shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, not {list(expected[name].shape)}")
    if problems:
        raise TwigVLMError(f"{file}: {'; '.join(problems)}; get the file again")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _write(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
