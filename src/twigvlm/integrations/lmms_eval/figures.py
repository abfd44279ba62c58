"""What a run of answers took, as figures for lmms-eval's results. Pure functions."""

from collections.abc import Sequence
from statistics import fmean

from twigvlm.integrations.lmms_eval.answering import Answered


def throughput(batches: Sequence[Answered], peak_bytes: int | None) -> dict[str, float | int]:
    """Figures of all answers of a task; lmms-eval prints each with `avg_` before its name.

    Args:
        batches: at least one.
        peak_bytes: most bytes held at once, weights included; None where the system does not say.

    Returns:
        `num_requests`, questions; `answer_speed`, tokens per second, the mean over answers (the paper's text), where lmms-eval's
        own `avg_speed` is the ratio of sums (the authors' code); `prompt_visual_tokens`, M; `visual_tokens`, R̄ as it was,
        by the rule that is the same for all methods; where the method refocuses `visual_tokens_again`, which ran beside R̄ through
        the pruned layers, mean over answers; where they are known: `first_token_ms`, `accepted_per_pass`, the drafted
        tokens that a pass of the base accepts, `token_acceptance`, TokAR, and `peak_gib`.
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
