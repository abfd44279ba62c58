"""How many visual tokens scout mode keeps of a picture, and the positions of the tokens around it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import fit_scouted, solve_scouted

OPTIONS = ("question", "retain", "keep", "diverse")
"""Options that a request may set in `mm_processor_kwargs`."""
PATCHES = 16_384
"""Largest number of patches of pictures that go through the vision tower together."""
QUESTION = 1024
"""Largest number of tokens of the prompt around a question. The ranking runs on this prompt in one pass, and vLLM reserved memory
for no more than the default question takes."""


def kept_tokens(settings: Mapping[str, Any], options: Mapping[str, object], visual: int) -> int:
    """R, the number of visual tokens to keep of a picture.

    A server cannot choose the size of pictures, and vLLM tries the largest one before it starts. So the settings' R̄ is fitted to
    every picture by `fit_scouted`, whereas an impossible budget of a request is an error.

    Args:
        settings: `twig_scout` of the model's config.
        options: options of the request: `keep` (R) or `retain` (R̄), instead of the settings' R̄.
        visual: M, the picture's visual tokens.

    Raises:
        TwigVLMError: the request asks for an average that no R has, for an R that is not in 1..M, or for both.
    """
    asked: Any = options.get("retain")
    wanted: Any = options.get("keep")
    shape = visual, settings["layers"], settings["trunk_layers"]
    if asked is not None and wanted is not None:
        raise TwigVLMError(f"retain={asked} and keep={wanted}: give only one of them")
    if asked is not None:
        return solve_scouted(float(asked), *shape)
    if wanted is None:
        return fit_scouted(float(settings["retain"]), *shape)
    keep = int(wanted)
    if not 1 <= keep <= visual:
        raise TwigVLMError(f"keep={keep}: must be 1 to {visual}, the visual tokens of this picture")
    return keep


def is_diverse(settings: Mapping[str, Any], options: Mapping[str, object]) -> bool:
    """Whether the kept tokens of a picture must also differ from each other; arguments as for `kept_tokens`.

    Raises:
        TwigVLMError: the request's value is not a boolean. A string such as "false" would count as true.
    """
    asked = options.get("diverse")
    if asked is None:
        return bool(settings["diverse"])
    if not isinstance(asked, bool):
        raise TwigVLMError(f"diverse={asked!r}: must be true or false, without quotation marks")
    return asked


def check_question(ids: Sequence[int], image_token: int, limit: int) -> None:
    """Refuse a question for which a picture cannot be ranked, before it reaches the model's process, which an error would stop.

    Args:
        ids: token ids of the prompt around the question, with the picture as one token.
        image_token: id of that token.
        limit: largest number of tokens of a whole prompt; more than `QUESTION` are refused in any case. The picture, whose size
            the processor limits, does not count.

    Raises:
        TwigVLMError: the question holds picture tokens, or is too long.
    """
    if list(ids).count(image_token) != 1 or ids[-1] == image_token:
        raise TwigVLMError("question: must be text without the placeholder of pictures")
    limit = min(limit, QUESTION)
    if len(ids) - 1 > limit:
        raise TwigVLMError(f"question: makes a prompt of {len(ids) - 1} tokens, of at most {limit}; shorten it")


def parts(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Split pictures into parts that go through the vision tower together; returns (first index, end index) of each part.

    Args:
        sizes: numbers of patches of the pictures.
        limit: largest number of patches of a part with several pictures; a larger picture is a part by itself.
    """
    cuts, held = [0], 0
    for index, size in enumerate(sizes):
        if index and held + size > limit:
            cuts.append(index)
            held = 0
        held += size
    return list(pairwise([*cuts, len(sizes)]))


def positions_around(tokens: int, pictures: Sequence[tuple[int, Tensor, int]]) -> tuple[Tensor, int]:
    """The positions that the kept tokens have in the whole prompt.

    Args:
        tokens: number of kept tokens of the prompt.
        pictures: for each picture, the index of its first kept token; the offsets of its kept tokens from the picture's first
            position, [3, R], as far as they are known; and the offset of the token after the picture from that position.

    Returns:
        Positions [3, tokens], and by how much the position of a later token exceeds its index.
    """
    positions = torch.zeros(3, tokens, dtype=torch.long)
    done, position = 0, 0
    for start, offsets, extent in sorted(pictures, key=lambda picture: picture[0]):
        positions[:, done:start] = torch.arange(position, position + start - done)
        position += start - done
        done = start + offsets.shape[1]
        positions[:, start:done] = position + offsets
        position += extent
    positions[:, done:] = torch.arange(position, position + tokens - done)
    return positions, position - done
