"""The lmms-eval tasks of the paper's tables, and how their scores are shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Benchmark:
    """How the score of an lmms-eval task is shown."""

    column: str
    """Heading of its column."""
    metrics: tuple[str, ...] = ("exact_match",)
    """The task's metrics whose sum is the score."""
    scale: float = 100.0
    """Factor of the metrics: 100 where lmms-eval gives a share from 0 to 1."""


BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    "gqa": Benchmark("GQA"),
    "mmbench_en_dev_static": Benchmark("MMB", ("gpt_eval_score",), 1),  # the name of the metric, without a judge
    "mmbench_en_dev": Benchmark("MMB (judge)", ("gpt_eval_score",), 1),
    "mme": Benchmark("MME", ("mme_perception_score", "mme_cognition_score"), 1),
    "textvqa_val_ocr": Benchmark("TextVQA"),
    "textvqa_val": Benchmark("TextVQA (no OCR)"),
    "scienceqa_img": Benchmark("SQA-I"),
    "vqav2_val": Benchmark("VQAv2"),
    "mmvet_plain": Benchmark("MM-Vet", ("gpt_eval_score",), 1),
    "tgif_qa_1k_judged": Benchmark("TGIF", ("judged",)),
    "msvd_qa_1k_judged": Benchmark("MSVD", ("judged",)),
    "msrvtt_qa_1k_judged": Benchmark("MSRVTT", ("judged",)),
    "activitynetqa": Benchmark("ActivityNet", ("gpt_eval_accuracy",), 1),
    "tgif_qa_1k": Benchmark("TGIF (no judge)", ("contained",)),
    "msvd_qa_1k": Benchmark("MSVD (no judge)", ("contained",)),
    "msrvtt_qa_1k": Benchmark("MSRVTT (no judge)", ("contained",)),
}
"""The paper's tasks, in the order of its columns. Any other task is shown by its own name and first metric."""
