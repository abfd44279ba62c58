"""Prompts of different lengths as one batch, padded on the left as processors pad for generation."""

from collections.abc import Sequence
from typing import Any

import torch


def batched(prompts: Sequence[dict[str, Any]], pad_token_id: int = 0) -> dict[str, Any]:
    """One batch of single prompts; pixels and the like are put one after another."""
    longest = max(one["input_ids"].shape[1] for one in prompts)

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [one[name] for one in prompts]
        return torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=value) for row in rows])

    per_token = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0}
    names = {name for one in prompts for name in one}
    batch = {name: padded(name, value) for name, value in per_token.items() if name in names}
    for name in names - batch.keys():
        batch[name] = torch.cat([one[name] for one in prompts if name in one])
    return batch
