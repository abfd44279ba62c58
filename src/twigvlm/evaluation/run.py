"""The one loop of every evaluation: a stopped run continues, and a question that fails is recorded as failed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from twigvlm.errors import TwigVLMError, is_out_of_memory, one_line
from twigvlm.evaluation.questions import Question
from twigvlm.evaluation.results_log import Record, ResultsLog


class Item(NamedTuple):
    """What has one record: a question, or several that are asked together."""

    about: Record
    """What the record begins with; it has an `id`."""
    questions: Sequence[Question]

    def limit(self, max_new_tokens: int, max_description_tokens: int) -> int:
        """Longest answer, in tokens."""
        return max(question.limit(max_new_tokens, max_description_tokens) for question in self.questions)


@runtime_checkable
class InputsOf(Protocol):
    """Questions as the base's inputs, several as a batch padded on the left."""

    def __call__(self, *questions: Question) -> dict[str, Any]:
        """Raises TwigVLMError where a question has no inputs: it failed, and the run goes on."""


Measure = Callable[[Item, dict[str, Any], int], Record]
"""(item, its inputs, its place among all) -> what the record holds beside `about`; raises TwigVLMError where the item fails,
for example because a prompt cannot have a budget. An item that memory does not suffice for fails too."""


def one_by_one(questions: Iterable[Question]) -> list[Item]:
    """Questions that are asked by themselves; their records have `id`, `picture`, `kind` and `long`."""

    def about(question: Question) -> Record:
        picture, kind, long = question.picture, question.group, question.has_long_answer
        return {"id": question.id, "picture": picture, "kind": kind, "long": long}

    return [Item(about(question), (question,)) for question in questions]


def run(
    items: Sequence[Item],
    inputs_of: InputsOf,
    measure: Measure,
    results_log: ResultsLog,
    remedy: str,
    advance: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Measure every item that the log does not hold already.

    Args:
        items: in the order in which they are measured.
        inputs_of: prepares the questions of an item.
        measure: gives the results.
        results_log: where records go.
        remedy: what to do where an item needs more memory than there is; the end of a message.
        advance: called with each record.

    Returns:
        The records, in the order of the items: `about` and the results; of an item that failed `about` and the reason, `failed`.

    Raises:
        TwigVLMError: the first item that has inputs cannot be measured: most likely none can.
    """
    records = []
    measured = any("failed" not in record for record in results_log.records.values())

    def results(item: Item, number: int) -> Record:
        try:
            inputs = inputs_of(*item.questions)
        except TwigVLMError as error:
            return {"failed": one_line(error)}
        try:
            return measure(item, inputs, number)
        except (TwigVLMError, MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                reason = f"there is not enough memory for this question; {remedy}"
            elif isinstance(error, TwigVLMError):
                reason = one_line(error)
            else:
                raise
            if not measured:
                raise TwigVLMError(reason) from error
            return {"failed": reason}

    for number, item in enumerate(items):
        record = results_log.results(item.about["id"])
        if record is None:
            record = results_log.append({**item.about, **results(item, number)})
        measured = measured or "failed" not in record
        records.append(record)
        advance(record)
    return records
