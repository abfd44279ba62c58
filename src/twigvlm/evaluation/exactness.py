"""What must not change an answer, counted: speculation, no pruning, and a twig that is switched off."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from twigvlm.evaluation.accuracy import InputsOf
from twigvlm.evaluation.journal import Journal, Record
from twigvlm.evaluation.tasks import Question
from twigvlm.model import TwigVLM

CHECKS = {
    "pruned chain": "chain speculation = no speculation, same pruning",
    "pruned tree": "tree speculation = no speculation, same pruning",
    "chain": "chain speculation = no speculation, unpruned",
    "tree": "tree speculation = no speculation, unpruned",
    "pruned auto": "auto speculation = no speculation, same pruning",
    "auto": "auto speculation = no speculation, unpruned",
    "no pruning": "R = M and K_f = L = the base's own generate",
    "disabled": "disabled() = the base before it had a twig, ids and logits bit for bit",
}
"""Checks and what each one says."""


def run_exactness(
    base: Any,
    grow: Callable[[], TwigVLM],
    questions: Sequence[Question],
    inputs_of: InputsOf,
    journal: Journal,
    retain: float,
    max_new_tokens: int = 16,
    max_description_tokens: int = 192,
    advance: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Compare answers token for token; prompts that the journal holds already are not asked again.

    Args:
        base: the base, before anything is grown on it.
        grow: puts the twig on it.
        retain: R̄ of the pruned check.
        max_new_tokens: longest short answer.
        max_description_tokens: longest description.
        advance: called twice for each prompt that is asked: after the base alone, and with its record.

    Returns:
        The records, in the order of the questions: `id`, `kind`, `tokens` (length of the base's answer), `same` by check.
    """
    todo = [question for question in questions if question.id not in journal.records]

    def limit(question: Question) -> int:
        return max_new_tokens if question.objects is None else max_description_tokens

    before = {}
    for question in todo:
        before[question.id] = _reference(base.generate, inputs_of(question), limit(question))
        advance({})
    model = grow()
    for question in todo:
        journal.append(_check(model, question, inputs_of(question), before[question.id], retain, limit(question)))
        advance(journal.records[question.id])
    return [journal.records[question.id] for question in questions]


def _check(
    model: TwigVLM,
    question: Question,
    inputs: dict[str, Any],
    before: tuple[list[int], str],
    retain: float,
    max_new_tokens: int,
) -> Record:
    options = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False}

    def ids(**more: Any) -> list[int]:
        output: Any = model.generate(**options, **more)
        new: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return new

    visual = int(model.base.visual_mask(inputs["input_ids"]).sum())
    pruned, plain = ids(retain=retain), ids()
    same = {
        "pruned chain": ids(retain=retain, speculate="chain") == pruned,
        "pruned tree": ids(retain=retain, speculate="tree") == pruned,
        "chain": ids(speculate="chain") == plain,
        "tree": ids(speculate="tree") == plain,
        "pruned auto": ids(retain=retain, speculate="auto") == pruned,
        "auto": ids(speculate="auto") == plain,
        "no pruning": ids(keep=visual, final_wipe=model.base.num_layers) == before[0],
    }
    with model.disabled():  # last: after the twig has been used
        same["disabled"] = _reference(model.generate, inputs, max_new_tokens) == before
    return {"id": question.id, "kind": question.group, "tokens": len(before[0]), "same": same}


def _reference(generate: Callable[..., Any], inputs: dict[str, Any], max_new_tokens: int) -> tuple[list[int], str]:
    """New ids, and a digest of the bits of all logits."""
    output = generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    digest = hashlib.sha256()
    for logits in output.logits:
        digest.update(_bits(logits))
    return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), digest.hexdigest()


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
