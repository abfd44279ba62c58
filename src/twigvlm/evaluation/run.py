"""The loop that all evaluations share: a stopped run can be continued, and a question that fails is recorded as failed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from twigvlm.errors import TwigVLMError, is_out_of_memory, one_line
from twigvlm.evaluation.questions import Question
from twigvlm.evaluation.results_log import Record, ResultsLog


class Item(NamedTuple):
    """What gets one record: a question, or several that are asked together."""

    about: Record
    """First fields of the record, among them `id`."""
    questions: Sequence[Question]
    """The question, or those that are asked together."""

    def limit(self, max_new_tokens: int, max_description_tokens: int) -> int:
        """Length of the longest answer, in tokens; arguments as of `Question.limit`."""
        return max(question.limit(max_new_tokens, max_description_tokens) for question in self.questions)


InputsOf = Callable[..., dict[str, Any]]
"""(*questions) -> inputs of the base, several as a batch padded on the left; raises TwigVLMError where a question has none."""

Measure = Callable[[Item, dict[str, Any], int], Record]
"""(item, its inputs, its index) -> further fields of its record; raises TwigVLMError if the item fails, for example because a
prompt cannot have a budget. An item that runs out of memory fails too."""


def one_by_one(questions: Iterable[Question]) -> list[Item]:
    """An item for each question; its record has `id`, `picture`, `kind` and `long`."""

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
        measure: measures an item.
        results_log: log that gets the records.
        remedy: what the user can do if an item runs out of memory; ends the error message.
        advance: called with each record.

    Returns:
        The records, in the order of the items: `about` with the results or, if the item failed, with the reason as `failed`.

    Raises:
        TwigVLMError: the first item with inputs cannot be measured, so that most likely none can.
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
