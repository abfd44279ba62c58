"""What scout mode keeps of a picture, and where the tokens around it stand."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.budget import average_scouted, solve_scouted

OPTIONS = ("question", "retain", "keep", "diverse")
"""What a request may say in `mm_processor_kwargs`."""
PATCHES = 16_384
"""Most patches of pictures that go through the vision tower together."""
QUESTION = 1024
"""Most tokens of the prompt around a question. The ranking sees that prompt in one pass, for which vLLM has set no memory aside
but what the default question takes."""


def kept_tokens(settings: Mapping[str, Any], options: Mapping[str, object], visual: int) -> int:
    """R of a picture. How large pictures are is not the server's choice, and vLLM tries the largest one before it starts: a
    picture that has no more tokens than the settings' R̄ keeps all, and of one so large that the trunk's layers alone take most
    of R̄ or more, half as many tokens as R̄ are kept.

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
        retain = float(settings["retain"])
        if visual <= retain:
            return visual
        return max(solve_scouted(max(retain, average_scouted(1, *shape)), *shape), ceil(retain / 2))
    keep = int(wanted)
    if not 1 <= keep <= visual:
        raise TwigVLMError(f"keep={keep}: must be 1 to {visual}, the visual tokens of this picture")
    return keep


def is_diverse(settings: Mapping[str, Any], options: Mapping[str, object]) -> bool:
    """Whether the kept tokens of a picture also differ from each other; arguments as for `kept_tokens`.

    Raises:
        TwigVLMError: the request says neither yes nor no. A string such as "false" would count as yes.
    """
    asked = options.get("diverse")
    if asked is None:
        return bool(settings["diverse"])
    if not isinstance(asked, bool):
        raise TwigVLMError(f"diverse={asked!r}: must be true or false, without quotation marks")
    return asked


def check_question(ids: Sequence[int], image_token: int, limit: int) -> None:
    """Refuse a question that a picture cannot be ranked for, in the server's process: in the model's, an error ends it for all.

    Args:
        ids: ids of the prompt around the question, the picture one token.
        image_token: its id.
        limit: largest number of tokens of a whole prompt; more than `QUESTION` are refused in any case. The picture, whose size
            the processor bounds, does not count.

    Raises:
        TwigVLMError: the question holds picture tokens, or is too long.
    """
    if list(ids).count(image_token) != 1 or ids[-1] == image_token:
        raise TwigVLMError("question: must be text without the placeholder of pictures")
    limit = min(limit, QUESTION)
    if len(ids) - 1 > limit:
        raise TwigVLMError(f"question: makes a prompt of {len(ids) - 1} tokens, of at most {limit}; shorten it")


def parts(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Which pictures go through the vision tower together: the first of them, and the one after the last.

    Args:
        sizes: sizes of the pictures.
        limit: largest size of a part of several pictures.
    """
    cuts, held = [0], 0
    for index, size in enumerate(sizes):
        if index and held + size > limit:
            cuts.append(index)
            held = 0
        held += size
    return list(pairwise([*cuts, len(sizes)]))


def positions_around(tokens: int, pictures: Sequence[tuple[int, Tensor, int]]) -> tuple[Tensor, int]:
    """Positions as in the whole prompt.

    Args:
        tokens: number of tokens of the prompt, as far as they are kept.
        pictures: where each begins; how far its kept tokens are from its first position, [3, R], as far as that is known; and by
            how much what follows is further on than its beginning.

    Returns:
        [3, tokens]; and by how much a later token's position exceeds its index.
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
