"""When the answers of one `generate` call end, for rows that do not advance together.

Plain numbers (the longest answer, EOS tokens) are taken out of Hugging Face's criteria. Of the others, those that look at the
end of a row or at the clock are asked row by row, and all that users write get the whole padded batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.generation import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from twigvlm.errors import TwigVLMError


@dataclass(frozen=True)
class Stopping:
    """When the answers of a request end: by whichever comes first."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]
    rows: StoppingCriteriaList
    """Hugging Face's criteria that look at the end of a row or at the clock."""
    batch: StoppingCriteriaList
    """All other criteria, which get the whole padded batch."""
    hidden_ids: tuple[Int[Tensor, "1 _"], ...]
    """What pads each row on the left."""

    @property
    def needs_ids(self) -> bool:
        """Whether `on_row` or `on_batch` must be asked after every token; two plain numbers decide otherwise."""
        return bool(self.rows or self.batch)

    @property
    def has_state(self) -> bool:
        """Whether one of them may remember what it was asked, as those of users do."""
        return bool(self.batch)

    @property
    def needs_lockstep(self) -> bool:
        """Whether rows must advance together and be asked about by `on_batch`."""
        return len(self.hidden_ids) > 1 and self.has_state

    def on_row(self, row: int, ids: Int[Tensor, "1 tokens"]) -> bool:
        """Whether criteria end a row, apart from the two plain numbers; without `needs_lockstep`.

        Args:
            row: index of the row in the request.
            ids: its prompt without padding, and its new tokens.
        """
        flags = self.rows(ids, None) | _flags(self.batch, padded(self.hidden_ids[row], ids))
        return bool(flags)

    def on_batch(self, ids: Int[Tensor, "batch tokens"], unfinished: Sequence[int]) -> Bool[Tensor, " batch"]:
        """Which rows the criteria end, apart from the two plain numbers. A finished row's flag means nothing.

        Args:
            ids: padded prompts and new tokens; a finished row goes on with the padding token.
            unfinished: rows whose answers went on up to the newest token.
        """
        flags = _flags(self.batch, ids)
        for row in unfinished if self.rows else ():
            flags[row] |= self.rows(ids[row : row + 1, self.hidden_ids[row].shape[1] :], None)[0]
        return flags


def split_criteria(
    criteria: StoppingCriteriaList, input_ids: Int[Tensor, "batch tokens"], padding: Sequence[int]
) -> Stopping:
    """Sort the stopping criteria that Hugging Face's `generate` prepared: plain numbers, rows' criteria and the batch's.

    Args:
        criteria: for the padded batch, the user's among them.
        input_ids: padded prompts, one for each answer.
        padding: number of padding tokens on the left of each row.

    Raises:
        TwigVLMError: nothing limits the answers' length, or a criterion needs scores or cannot be called.
    """
    lengths: list[int] = []
    eos_token_ids: set[int] = set()
    rows, batch = StoppingCriteriaList(), StoppingCriteriaList()
    for criterion in criteria:
        if not callable(criterion):
            raise TwigVLMError(
                f"stopping_criteria: {type(criterion).__name__} is not callable; pass objects that take (input_ids, scores)"
            )
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos_token_ids.update(int(token) for token in criterion.eos_token_id.flatten().tolist())
        elif type(criterion) is ConfidenceCriteria:
            raise TwigVLMError(
                "ConfidenceCriteria: needs scores, which criteria do not receive with a twig; leave it out"
            )
        elif type(criterion) in (StopStringCriteria, MaxTimeCriteria):
            rows.append(criterion)
        else:
            batch.append(criterion)
    if not lengths:
        raise TwigVLMError("max_new_tokens is not set: pass max_new_tokens")
    # Hugging Face's loop asks its criteria after a token, so every answer has one.
    limit = max(min(lengths) - input_ids.shape[1], 1)
    hidden_ids = tuple(input_ids[row : row + 1, :count] for row, count in enumerate(padding))
    return Stopping(limit, frozenset(eos_token_ids), rows, batch, hidden_ids)


def _flags(criteria: StoppingCriteriaList, ids: Tensor) -> Tensor:
    """Which rows of the whole padded batch these criteria end, [batch]."""
    flags = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for criterion in criteria:
        done = criterion(ids, None)
        shape = tuple(done.shape) if hasattr(done, "shape") else type(done).__name__
        if shape not in ("bool", (), (1,), (len(ids),)):
            raise TwigVLMError(
                f"stopping_criteria: {type(criterion).__name__} returned {shape}; return a bool for each row, ({len(ids)},)"
            )
        flags = flags | torch.as_tensor(done, device=ids.device).bool()
    return flags


def padded(hidden_ids: Tensor, ids: Tensor) -> Tensor:
    """The ids of a row after the padding that it has in its batch, [1, padding + tokens]."""
    return torch.cat((hidden_ids, ids), dim=1) if hidden_ids.shape[1] else ids
