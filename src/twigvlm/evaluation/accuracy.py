"""Measure the accuracy of every method under every budget, on the same questions, in one run."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.metrics import overlap
from twigvlm.evaluation.questions import Namer, Question, Questions, exact_match, quoted
from twigvlm.evaluation.results_log import Record, ResultsLog
from twigvlm.evaluation.run import InputsOf, Item, one_by_one, run
from twigvlm.evaluation.variants import Variant, answer_all, named_refusal
from twigvlm.model import TwigVLM


def run_accuracy(
    model: TwigVLM,
    tokenizer: Any,
    questions: Questions,
    variants: Sequence[Variant],
    inputs_of: InputsOf,
    results_log: ResultsLog,
    max_new_tokens: int = 16,
    max_description_tokens: int = 192,
    seed: int = 0,
    advance: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Ask every question under every variant, except for questions that the log has already.

    Args:
        model: the base with its twig.
        tokenizer: the base's tokenizer.
        questions: the questions.
        variants: from `make_variants`.
        inputs_of: prepares a question.
        results_log: log that gets the records.
        max_new_tokens: longest short answer, in tokens.
        max_description_tokens: longest description, in tokens.
        seed: seed of random choices, which differ from question to question.
        advance: called with each record.

    Returns:
        The records, in the order of the questions: the fields of `one_by_one`, `answer` (the right one) and, for each variant,
        `kept` (R), `average` (R̄), `ran` (visual tokens that ran again after refocusing), `looks` (how often tokens were chosen
        again; None without refocusing), `steps` (of decoding), `given` (the variant's answer) and `score` (see `score`). A
        question that failed has `failed`, the reason, instead of these.

    Raises:
        TwigVLMError: the first question with inputs cannot be answered, for example because a budget is impossible; the message
            names the methods.
    """
    namer = Namer(questions.vocabulary)

    def measure(item: Item, inputs: dict[str, Any], number: int) -> Record:
        (question,) = item.questions
        longest = item.limit(max_new_tokens, max_description_tokens)
        own_seed = zlib.crc32(f"{seed} {question.id}".encode())
        try:
            outcomes = answer_all(model, inputs, variants, longest, own_seed)
        except TwigVLMError as error:
            raise named_refusal(model, inputs, variants, error) from None
        given = {name: tokenizer.decode(one.ids, skip_special_tokens=True).strip() for name, one in outcomes.items()}
        return {
            "answer": question.answer,
            "kept": {name: outcome.kept for name, outcome in outcomes.items()},
            "average": {name: outcome.average for name, outcome in outcomes.items()},
            "ran": {name: outcome.ran for name, outcome in outcomes.items()},
            "looks": {name: outcome.looks for name, outcome in outcomes.items()},
            "steps": {name: outcome.steps for name, outcome in outcomes.items()},
            "given": given,
            "score": {name: score(question, text, namer) for name, text in given.items()},
        }

    remedy = "use smaller pictures, or fewer --methods or --budgets"  # all variants of a question are answered together
    return run(one_by_one(questions.items), inputs_of, measure, results_log, remedy, advance)


def score(question: Question, text: str, namer: Namer) -> int | list[int]:
    """Score an answer: 1 if it is right, otherwise 0; a description gets a list of five counts, of objects found, present and
    named, and of texts quoted and present.

    Args:
        question: the question.
        text: the answer.
        namer: finds the objects that a description names.
    """
    if question.objects is None:
        return int(exact_match(text, question.answer))
    read = sum(quoted(written, text) for written in question.texts)
    return [*overlap(set(question.objects), namer(text)), read, len(question.texts)]
