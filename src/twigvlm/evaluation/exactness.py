"""Count answers that change although they must not: by speculation, without pruning, and with the twig switched off."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.methods import parse_methods
from twigvlm.evaluation.questions import Question
from twigvlm.evaluation.results_log import Record, ResultsLog
from twigvlm.evaluation.run import InputsOf, Item, one_by_one, run
from twigvlm.model import TwigVLM

CHECKS = {
    "pruned chain": "chain speculation = no speculation, same pruning",
    "pruned tree": "tree speculation = no speculation, same pruning",
    "chain": "chain speculation = no speculation, unpruned",
    "tree": "tree speculation = no speculation, unpruned",
    "pruned auto": "auto speculation = no speculation, same pruning",
    "auto": "auto speculation = no speculation, unpruned",
    "pruned lookup": "prompt lookup = no speculation, same pruning",
    "lookup": "prompt lookup = no speculation, unpruned",
    "exit": "early exit = no speculation, unpruned",
    "no pruning": "R = M and K_f = L = the base's own generate",
    "disabled": "disabled() = the base before it had a twig, ids and logits bit for bit",
}
"""Name of each check -> what must be equal, in the order of the checks. The last one runs after the twig was used."""

BASE_CHECKS = {"no pruning", "disabled"}
"""Checks that compare with the base before it got a twig."""


def choose_checks(names: Sequence[str]) -> list[str]:
    """The named checks in the order of `CHECKS`; all of them if none is named.

    Raises:
        TwigVLMError: there is no check of a name.
    """
    for name in names:
        if name not in CHECKS:
            raise TwigVLMError(f"check {name!r}: must be one of {', '.join(CHECKS)}")
    return [check for check in CHECKS if check in (names or CHECKS)]


def run_exactness(
    base: Any,
    grow: Callable[[], TwigVLM],
    questions: Sequence[Question],
    inputs_of: InputsOf,
    results_log: ResultsLog,
    retain: float,
    checks: Sequence[str],
    max_new_tokens: int = 16,
    max_description_tokens: int = 192,
    advance: Callable[[Record], None] = lambda record: None,
    method: str = "twig",
) -> list[Record]:
    """Compare answers token by token. Prompts that the log has already are not asked again.

    Args:
        base: the base, without a twig.
        grow: makes the TwigVLM of the base with its twig.
        questions: the questions.
        inputs_of: prepares a question.
        results_log: log that gets the records.
        retain: R̄ of the pruned checks.
        checks: from `choose_checks`.
        max_new_tokens: longest short answer, in tokens.
        max_description_tokens: longest description, in tokens.
        advance: called with every record, and before that once for each prompt, after the base alone answered it.
        method: name of the pruning method of the pruned checks, for `parse_method`.

    Returns:
        The records, in the order of the questions: `id`, `kind`, `tokens` (length of the base's answer or, if no check needs it,
        of the answer without speculation), and for each check `same`. A question that failed has `failed`, the reason,
        instead of these.

    Raises:
        TwigVLMError: the method cannot prune this base, or the first question with inputs cannot be checked.
    """
    before = {}
    for item in one_by_one(questions):
        if results_log.results(item.about["id"]) is None:
            if BASE_CHECKS & set(checks):
                with suppress(TwigVLMError):  # such a question fails once more, and is recorded, with the twig
                    longest = item.limit(max_new_tokens, max_description_tokens)
                    before[item.about["id"]] = _reference(base.generate, inputs_of(*item.questions), longest)
            advance({})
    model = grow()
    (prunes,) = parse_methods(model, [method])
    pruning = {"retain": retain, **prunes.options(model, None, None, seed=0)}

    def measure(item: Item, inputs: dict[str, Any], number: int) -> Record:
        longest = item.limit(max_new_tokens, max_description_tokens)
        tokens, same = _check(model, inputs, before.get(item.about["id"]), pruning, checks, longest)
        return {"tokens": tokens, "same": same}

    remedy = "use smaller pictures, or --dtype bfloat16"
    return run(one_by_one(questions), inputs_of, measure, results_log, remedy, advance)


def _check(
    model: TwigVLM,
    inputs: dict[str, Any],
    before: tuple[list[int], str] | None,
    pruning: dict[str, Any],
    checks: Sequence[str],
    max_new_tokens: int,
) -> tuple[int, dict[str, bool]]:
    options = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False}
    visual = int(model.base.visual_mask(inputs["input_ids"]).sum())

    @cache
    def ids(pruned: bool, speculate: str) -> list[int]:
        more: dict[str, Any] = pruning if pruned else {}
        output: Any = model.generate(**options, **more, speculate=speculate)
        return _new(output, inputs)

    def same(check: str) -> bool:
        if check == "disabled":
            with model.disabled():
                return _reference(model.generate, inputs, max_new_tokens) == before
        if check == "no pruning":
            output: Any = model.generate(**options, keep=visual, final_wipe=model.base.num_layers)
            assert before is not None, "a check of BASE_CHECKS"
            return _new(output, inputs) == before[0]
        pruned = check.startswith("pruned ")
        return ids(pruned, check.removeprefix("pruned ")) == ids(pruned, "none")

    answer = before[0] if before else ids(checks[0].startswith("pruned "), "none")
    return len(answer), {check: same(check) for check in checks}


def _reference(generate: Callable[..., Any], inputs: dict[str, Any], max_new_tokens: int) -> tuple[list[int], str]:
    """New ids of an answer, and a digest of the bits of all of its logits."""
    output = generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    digest = hashlib.sha256()
    for logits in output.logits:
        digest.update(_bits(logits))
    return _new(output.sequences, inputs), digest.hexdigest()


def _new(sequences: Tensor, inputs: dict[str, Any]) -> list[int]:
    ids: list[int] = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
