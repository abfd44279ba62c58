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
"""Of pictures that go through the vision tower together."""


def kept_tokens(settings: Mapping[str, Any], options: Mapping[str, object], visual: int) -> int:
    """R of a picture. How large pictures are is not the server's choice, and vLLM tries the largest one before it starts: of a
    picture so large that the trunk's layers alone take most of the settings' R̄ or more, half as many tokens as R̄ are kept, and
    a picture that has no more tokens than R̄ keeps all.

    Args:
        settings: `twig_scout` of the model's config.
        options: options of the request: `keep` (R) or `retain` (R̄), instead of the settings' R̄.
        visual: M, the picture's visual tokens.

    Raises:
        TwigVLMError: the request asks for an average that no R has, or for an R that is not in 1..M.
    """
    given: Any = options
    shape = visual, settings["layers"], settings["trunk_layers"]
    if given.get("keep") is None:
        if given.get("retain") is not None:
            return solve_scouted(float(given["retain"]), *shape)
        low, high = (average_scouted(keep, *shape) for keep in (1, visual))
        retain = float(settings["retain"])
        return max(solve_scouted(min(max(retain, low), high), *shape), min(visual, ceil(retain / 2)))
    keep = int(given["keep"])
    if not 1 <= keep <= visual:
        raise TwigVLMError(f"keep={keep}: must be 1 to {visual}, the visual tokens of this picture")
    return keep


def check_question(ids: Sequence[int], image_token: int, limit: int) -> None:
    """Refuse a question that a picture cannot be ranked for, in the server's process: in the model's, an error ends it for all.

    Args:
        ids: ids of the prompt around the question, the picture one token.
        image_token: its id.
        limit: largest number of tokens of a whole prompt. The picture, whose size the processor bounds, does not count.

    Raises:
        TwigVLMError: the question holds picture tokens, or is too long.
    """
    if list(ids).count(image_token) != 1 or ids[-1] == image_token:
        raise TwigVLMError("question: must be text without the placeholder of pictures")
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
