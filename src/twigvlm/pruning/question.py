"""The question of a prompt, and who attends from it: what methods between layers rank by."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.base.layers import project_keys, project_queries, window_of
from twigvlm.base.packing import left_pack, valid_mask
from twigvlm.base.prompt import Prompt
from twigvlm.base.token_inputs import TokenInputs, select_tokens
from twigvlm.pruning.attention_rows import attention_chunks
from twigvlm.pruning.select import gather_tokens
from twigvlm.pruning.view import CutView


def question_mask(prompt: Prompt) -> Bool[Tensor, "batch tokens"]:
    """True at the text after the last visual token of each prompt; without any, or without text after it, at the last token."""
    visual, device = prompt.visual_mask, prompt.hidden.device
    valid = valid_mask(prompt.lengths, visual.shape[1], device)
    behind = valid & (visual.flip(1).cumsum(dim=1).flip(1) == 0)
    ends = torch.tensor(prompt.lengths, device=device)[:, None] - 1
    last = torch.zeros_like(valid).scatter(1, ends, True)
    return torch.where(behind.any(dim=1, keepdim=True), behind, last)


class QuestionRows(NamedTuple):
    """Attention from some tokens, a few of them at a time."""

    shares: Float[Tensor, "batch heads queries tokens"]
    """Softmax over all keys."""
    asks: Bool[Tensor, "batch queries"]
    """False where a row has fewer such tokens than others."""
    inputs: TokenInputs
    """Per-token inputs of the queries."""


def attention_from(view: CutView, asking: Bool[Tensor, "batch prompt_tokens"]) -> Iterator[QuestionRows]:
    """Attention from some of the tokens that are left, in the layer before a cut.

    Args:
        view: at the cut.
        asking: True at them, in the whole prompt; those that were cut do not ask.
    """
    layer, tokens = view.base.layers[view.layer - 1], view.tokens
    left = valid_mask(tokens.lengths, tokens.hidden.shape[1], asking.device)
    here = (asking if tokens.index is None else asking.gather(1, tokens.index)) & left
    positions, counts = left_pack(here)
    inputs = select_tokens(tokens.inputs, positions)
    queries = project_queries(layer, gather_tokens(view.before, positions), inputs)
    keys = project_keys(layer, view.before, tokens.inputs)
    asks = valid_mask(counts, positions.shape[1], asking.device)
    scaling, window, at = cast(Any, layer).self_attn.scaling, window_of(layer), tokens.inputs.positions
    query_positions = positions if inputs.positions is None else inputs.positions
    rows = attention_chunks(
        queries, keys, scaling, query_positions, window, key_positions=at, attends_until=inputs.attends_until
    )
    for part, shares in rows:
        yield QuestionRows(shares, asks[:, part], select_tokens(tokens.inputs, positions[:, part]))
