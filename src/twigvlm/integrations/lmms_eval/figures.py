"""The cost of a run's answers, as figures for lmms-eval's results. Pure functions."""

from collections.abc import Sequence
from statistics import fmean

from twigvlm.integrations.lmms_eval.answering import Answered


def throughput(batches: Sequence[Answered], peak_bytes: int | None) -> dict[str, float | int]:
    """Figures over all answers of a task; lmms-eval puts `avg_` before the name of each.

    Args:
        batches: answered batches, at least one.
        peak_bytes: peak memory in bytes, weights included; None where the system does not report it.

    Returns:
        `num_requests`: number of questions; `answer_speed`: tokens per second, the mean over answers as the paper's text has it
        (lmms-eval's own `avg_speed` is the ratio of sums, as in the authors' code); `prompt_visual_tokens`: M; `visual_tokens`:
        R̄ as measured, by the same rule for all methods; if the method refocuses, `visual_tokens_again`: visual tokens that ran
        through the pruned layers again, mean over answers; and where they are known: `first_token_ms`, `accepted_per_pass`
        (drafted tokens accepted by a pass of the base), `token_acceptance` (TokAR) and `peak_gib`.
    """
    figures: dict[str, float | int] = {
        "num_requests": sum(len(batch.tokens) for batch in batches),
        "answer_speed": fmean(tokens / batch.seconds for batch in batches for tokens in batch.tokens),
        "prompt_visual_tokens": fmean(count for batch in batches for count in batch.visual),
        "visual_tokens": fmean(count for batch in batches for count in batch.average_visual),
    }
    again = [count for batch in batches for count in batch.visual_again or ()]
    if again:
        figures["visual_tokens_again"] = sum(again) / figures["num_requests"]
    first = [batch.first_token for batch in batches if batch.first_token is not None]
    if len(first) == len(batches):
        figures["first_token_ms"] = 1000 * fmean(first)
    if drafted := sum(batch.drafted for batch in batches):
        accepted = sum(batch.accepted for batch in batches)
        figures["accepted_per_pass"] = accepted / sum(batch.passes for batch in batches)
        figures["token_acceptance"] = accepted / drafted
    if peak_bytes is not None:
        figures["peak_gib"] = peak_bytes / 2**30
    return figures
