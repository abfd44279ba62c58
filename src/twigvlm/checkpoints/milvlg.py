"""Twigs as the method's authors publish them, turned into ours.

Their checkpoints hold a twig as the language model that it was trained as: its layers under `model.layers`, its norm, its
head, and the gates of a P-Head where it has one, in safetensors or pickled files.
"""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twigvlm.base.vlm import BaseVLM
from twigvlm.checkpoints.twig_files import check_finite
from twigvlm.config import TwigConfig
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.model import TwigVLM
from twigvlm.twig.block import Twig

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GATES = "leaf_attention_module"  # of the P-Head
_OTHERS = {
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    f"{_GATES}.q_gate.weight": "pruning_head.query_gate.weight",
    f"{_GATES}.k_gate.weight": "pruning_head.key_gate.weight",
}
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # older transformers saved what it computes


def import_milvlg(model: Any, folder: Path, trunk_layers: int, final_wipe: int | None = None) -> TwigVLM:
    """A published checkpoint as a twig on its base.

    The Hugging Face conversion of a base may have more rows in its head than the original that the twig was trained on:
    such a twig drafts the tokens that it knows.

    Args:
        model: the base, a Hugging Face VLM.
        folder: holds the checkpoint's weight files.
        trunk_layers: K, which the weights do not tell.
        final_wipe: K_f to prune with by default; None: no FinalWipe.

    Raises:
        TwigVLMError: no weights, keys or shapes other than a twig's, or more head rows than the base has.
    """
    weights = {name: tensor for name, tensor in _read(folder) if not _DERIVED.fullmatch(name)}
    layers = sorted({int(match[1]) for match in map(_LAYER.fullmatch, weights) if match})
    head = weights.get("lm_head.weight")
    if not layers or head is None or "model.norm.weight" not in weights:
        raise TwigVLMError(f"{folder}: holds no twig (model.layers.*, model.norm and lm_head); name its directory")
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = _LAYER.fullmatch(name)
        if match:
            state[f"layers.{layers.index(int(match[1]))}.{match[2]}"] = tensor
        elif name in _OTHERS:
            state[_OTHERS[name]] = tensor
        else:
            raise TwigVLMError(f"{folder}: {name} is not a known part of a twig; update twigvlm")
    base = BaseVLM(model)
    rows = base.vocabulary
    if len(head) > rows:
        raise TwigVLMError(
            f"{folder}: its head has {len(head)} rows, this base's {rows}; name the base it was trained on"
        )
    known = None if len(head) == rows else torch.arange(len(head))
    config = TwigConfig(
        trunk_layers,
        len(layers),
        draft_vocabulary=None if known is None else len(head),
        final_wipe=final_wipe,
        pruning_head=any(name.startswith(_GATES) for name in weights),
    )
    twig = Twig(base, config, known, fresh=False)
    if known is not None:
        state["draft_token_ids"] = known
    try:
        twig.load_state_dict(state)
    except RuntimeError as error:
        raise TwigVLMError(
            f"{folder}: does not fit on this base ({one_line(error)}); name the base it was trained on"
        ) from None
    check_finite(twig.state_dict(), str(folder))
    return TwigVLM(base, twig)


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    pickled = (
        file for file in folder.glob("*.bin") if file.name != "training_args.bin"
    )  # a Trainer's, beside its weights
    files = sorted(folder.glob("*.safetensors")) or sorted(pickled)
    if not files:
        raise TwigVLMError(f"{folder}: no .safetensors or .bin file here; name the directory of a published twig")
    for file in files:
        try:
            if file.suffix == ".safetensors":
                yield from load_file(file).items()
            else:
                yield from torch.load(file, map_location="cpu", weights_only=True).items()
        except (
            SafetensorError,
            OSError,
            RuntimeError,
            EOFError,
            AttributeError,
            pickle.UnpicklingError,
            ValueError,
        ) as error:
            raise TwigVLMError(f"{file}: cannot be read ({one_line(error)}); get the file again") from None
