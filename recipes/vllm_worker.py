"""One way to answer, in a process of its own, for `recipes.vllm_bench`: vLLM, Hugging Face's generate, or this library."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

_CACHE = 2**29  # bytes, on a CPU

Answer = dict[str, Any]
"""`seconds`; of each prompt `ids` and `texts`; `drafts` (steps that verified some) and `accepted` (drafted tokens)."""


@dataclass(frozen=True)
class System:
    """A way to answer."""

    name: str
    engine: str
    """vllm, hf or twigvlm."""
    base: str
    drafter: str
    twig: str
    tokens: int = 0
    """Drafted per step, by vLLM."""
    retain: float | None = None
    """R̄, of tokens that also differ from each other; None: no pruning."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """vLLM's `hf_overrides`."""
    dtype: str = "float32"
    device: str = "cpu"
    rows: int = 8
    gpu_share: float = 0.1
    """Of the GPU's memory, for an engine of vLLM."""


def serve(connection: Connection, system: System) -> None:
    """Answer requests `(prompts, pictures, questions, max_new_tokens)` until None comes."""
    # Processes take turns: threads of those that wait must not spin.
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0", KMP_BLOCKTIME="0")
    os.environ.update(OMP_WAIT_POLICY="passive", VLLM_LOGGING_LEVEL="ERROR")
    if system.tokens or system.overrides:
        # vLLM's second model runner drafts on few bases, and on none in scout mode.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    answer = {"vllm": _vllm, "hf": _hf, "twigvlm": _twigvlm}[system.engine](system)
    connection.send("ready")
    while (request := connection.recv()) is not None:
        connection.send(answer(*request))


def _vllm(system: System) -> Callable[..., Answer]:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"hf_overrides": system.overrides} if system.overrides else {}
    if system.tokens:
        drafter = {"method": "eagle3", "model": system.drafter, "num_speculative_tokens": system.tokens}
        options["speculative_config"] = drafter
    if system.device == "cpu":
        options["enforce_eager"] = True
        options["kv_cache_memory_bytes"] = _CACHE  # or the many engines of a comparison do not fit into memory together
    else:
        options["gpu_memory_utilization"] = system.gpu_share
    engine = LLM(
        model=system.base,
        dtype=system.dtype,
        max_model_len=2048,
        max_num_seqs=system.rows,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **options,
    )
    numbers = count()

    def counted() -> tuple[int, int]:
        found = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
        return tuple(found.get(f"vllm:spec_decode_num_{name}", 0) for name in ("drafts", "accepted_tokens"))

    def answer(texts: list[str], pictures: list[Any], questions: list[str], max_new_tokens: int) -> Answer:
        prompts: list[dict[str, Any]] = []
        for text, picture, question in zip(texts, pictures, questions, strict=True):
            # A name of its own: nobody's picture is in a cache.
            one = {"prompt": text, "multi_modal_data": {"image": picture}}
            one["multi_modal_uuids"] = {"image": [f"picture-{next(numbers)}"]}
            prompts.append({**one, "mm_processor_kwargs": {"question": question}} if system.overrides else one)
        before, start = counted(), time.perf_counter()
        outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_new_tokens), use_tqdm=False)
        seconds, after = time.perf_counter() - start, counted()
        return {
            "seconds": seconds,
            "ids": [list(output.outputs[0].token_ids) for output in outputs],
            "texts": [output.outputs[0].text.strip() for output in outputs],
            "drafts": after[0] - before[0],
            "accepted": after[1] - before[1],
        }

    return answer


def _hf(system: System) -> Callable[..., Answer]:
    from twigvlm.evaluation.batches import up_to_end
    from twigvlm.loading import load_base

    base, processor = load_base(system.base, system.dtype, system.device)

    def answer(texts: list[str], pictures: list[Any], questions: list[str], max_new_tokens: int) -> Answer:
        start = time.perf_counter()
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True, padding_side="left")
        inputs = inputs.to(base.device, base.dtype)
        out = base.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        seconds = time.perf_counter() - start
        ids = up_to_end(out[:, inputs["input_ids"].shape[1] :].tolist(), base.generation_config)
        return _result(seconds, ids, processor, 0, 0)

    return answer


def _twigvlm(system: System) -> Callable[..., Answer]:
    from twigvlm.evaluation.batches import up_to_end
    from twigvlm.loading import load

    base, processor, model = load(system.base, system.twig, system.dtype, system.device)
    assert model is not None, "it has a twig"
    model.costs()  # measures this machine once

    def answer(texts: list[str], pictures: list[Any], questions: list[str], max_new_tokens: int) -> Answer:
        start = time.perf_counter()
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True, padding_side="left")
        inputs = inputs.to(base.device, base.dtype)
        options = {"speculate": "auto", "return_dict_in_generate": True}
        if system.retain is not None:
            options |= {"retain": system.retain, "diverse": True}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
        seconds = time.perf_counter() - start
        new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        steps = sum(sum(n > 0 for n in row) for row in output.drafted_lengths)
        accepted = sum(map(sum, output.accepted_lengths))
        return _result(seconds, up_to_end(new, base.generation_config), processor, steps, accepted)

    return answer


def _result(seconds: float, ids: list[list[int]], processor: Any, drafts: int, accepted: int) -> Answer:
    texts = [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
    return {
        "seconds": seconds,
        "ids": ids,
        "texts": texts,
        "drafts": drafts,
        "accepted": accepted,
    }
