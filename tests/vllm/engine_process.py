"""One vLLM engine in a process of its own: jobs in, answers and counts of drafts out, as JSON files.

    python -m tests.vllm.engine_process JOBS RESULTS

Engines leave state in their process, and the tests need several.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
OPTIONS = {"enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 8, "disable_log_stats": False}


def counts(engine: Any) -> dict[str, int]:
    """What the engine has counted so far of drafts."""
    prefix = "vllm:spec_decode_num_"
    found = {metric.name: metric for metric in engine.get_metrics() if metric.name.startswith(prefix)}
    return {name.removeprefix(prefix): metric.value for name, metric in found.items() if hasattr(metric, "value")}


def answer(engine: Any, job: dict[str, Any], pictures: list[Any]) -> dict[str, Any]:
    """Ids of every answer of a job, and the drafts that were made for it."""
    from vllm import SamplingParams

    prompts, sampling = [], []
    for index, given in enumerate(job["prompts"]):
        prompt: dict[str, Any] = {"prompt": given["text"]}
        if given.get("pictures"):
            prompt["multi_modal_data"] = {"image": [pictures[number] for number in given["pictures"]]}
        if "processor" in given:
            prompt["mm_processor_kwargs"] = given["processor"]
        prompts.append(prompt)
        options = {"temperature": 0.0, "max_tokens": given["tokens"], **job.get("sampling", {})}
        if job.get("seeded"):
            options["seed"] = index
        sampling.append(SamplingParams(**options))
    before = counts(engine)
    if job.get("together"):
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
    else:
        pairs = zip(prompts, sampling, strict=True)
        outputs = [engine.generate([one], [how], use_tqdm=False)[0] for one, how in pairs]
    made = {name: value - before.get(name, 0) for name, value in counts(engine).items()}
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    return {"ids": ids, "prompt_tokens": [len(output.prompt_token_ids) for output in outputs], "drafts": made}


def correct_sampling() -> None:
    """Give vLLM 0.32 on a CPU the temperatures that its rejection sampler asks for. Until a tested vLLM does so itself.

    Its `_expand_kernel_impl` (`utils/cpu_triton_utils.py`) fills a copy of what is not int64, so the temperature, top_k and top_p
    of drafted tokens are what was in memory before, whatever drafts. GPUs run another kernel. This is for the test of sampling
    alone: users have vLLM as it is, and docs/vllm.md says what that means.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand(x: Any, ends: Any, tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        counts = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
        values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return values.repeat_interleave(counts, output_size=tokens)

    rejection_sampler.expand_batch_to_tokens = expand


def main(jobs: str, results: str) -> None:
    from PIL import Image
    from vllm import LLM

    correct_sampling()
    given = json.loads(Path(jobs).read_text())
    engine = LLM(**{**OPTIONS, **given["engine"]})
    pictures = [Image.open(path).convert("RGB") for path in given["pictures"]]
    Path(results).write_text(json.dumps({job["name"]: answer(engine, job, pictures) for job in given["jobs"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
