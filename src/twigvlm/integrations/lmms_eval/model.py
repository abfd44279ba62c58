"""The model `twigvlm` of lmms-eval."""

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.assisted import check_assistant
from twigvlm.evaluation.peak_memory import peak, reset_peak
from twigvlm.integrations.lmms_eval import NEEDS
from twigvlm.integrations.lmms_eval.answering import Answered, Answerer, Setting
from twigvlm.integrations.lmms_eval.figures import throughput
from twigvlm.integrations.lmms_eval.messages import to_messages
from twigvlm.loading import SAPLING, default_twig, load_base, without_twig
from twigvlm.model import TwigVLM

try:
    from accelerate import Accelerator
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lmms_eval":
        raise
    raise TwigVLMError(NEEDS) from None

_START = (
    "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
)
SYSTEMS = {
    "vicuna": (_START + "polite answers to the {0}'s questions.").format("user"),
    "llava-v1": (_START + "polite answers to the {0}'s questions.").format("human"),
}
"""System sentences by name: of the conversations that LLaVA-1.5 (vicuna) and Video-LLaVA (llava-v1) are evaluated in."""
_SAMPLING = ("temperature", "top_p", "top_k")


class TwigVLMChat(lmms):
    """A base with any pruning method, budget and way to draft, on any task whose answers are generated.

    Args: those of `--model_args`; lmms-eval adds `batch_size`, `max_batch_size` and `device`.
        pretrained: base: "sapling", a Hugging Face id or a directory.
        twig: directory or hub id; None: Sapling's own, or none.
        method: none, or a method of `twigvlm evaluate accuracy`; None: twig if a budget is given, otherwise none.
        retain: R̄, or a share of each prompt's visual tokens such as 33.3%. A prompt with no more than that is not pruned.
        speculate: how to draft, as in `TwigVLM.generate`; without pruning also hf-lookup, transformers' own prompt lookup, or
            draft:MODEL, a small model by its Hugging Face id or directory, for the base's own `generate`.
        final_wipe: K_f; None: as the twig was tuned.
        final_share: φ; None: as the twig was tuned.
        pad: whether pictures are padded to squares, as LLaVA-1.5's evaluation does.
        system: a system sentence, one of `SYSTEMS` by its name, or a file that holds one.
        frames: number of frames of a video.
        max_new_tokens: longest answer, in tokens, for tasks that set no limit themselves.
        dtype: data type of the weights.
        attention: sdpa, eager or flash_attention_2; auto: as the base is loaded.
        device: auto: a GPU if there is one, a different one for each process.
        batch_size: questions that are answered together.
        max_batch_size: limit of automatic batch sizes, which are not supported.
        seed: seed of the ranking `random`.
        drafting: δ, θ, D, E, K_sel, N_max and n, under the names that they have in `generate`.

    Raises:
        TwigVLMError: an argument is unknown, out of range or does not apply, or something cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = SAPLING,
        twig: str | None = None,
        method: str | None = None,
        retain: float | str | None = None,
        speculate: str = "none",
        final_wipe: int | None = None,
        final_share: float | None = None,
        pad: bool = False,
        system: str = "",
        frames: int | None = None,
        max_new_tokens: int = 128,
        dtype: str = "auto",
        attention: str = "auto",
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
        **drafting: float,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1 or max_batch_size is not None:
            raise TwigVLMError(
                f"batch_size={batch_size}: must be a number, 1 or more; automatic sizes are not supported"
            )
        method = method or ("none" if retain is None else "twig")
        setting = Setting(method, retain, speculate, final_wipe, final_share, seed, drafting)
        setting.check_batch(int(batch_size))
        if setting.needs_twig and twig is None and pretrained != SAPLING:
            raise TwigVLMError(f"method={method}, speculate={speculate}: need a twig grown on {pretrained!r}; name one")
        system = SYSTEMS.get(system) or self._resolve_system_prompt(system)
        hf_model, processor = load_base(pretrained, dtype, self._place(device))
        if attention != "auto":
            hf_model.set_attn_implementation(attention)  # before a twig grows: it takes its base's
        model = None if setting.is_base else _grow(hf_model, pretrained, twig, setting)
        if model is not None and speculate == "auto":
            model.costs()  # part of no answer's time
        base = BaseVLM(hf_model) if model is None else model.base
        assistant = None
        if setting.assistant is not None:
            assistant, _ = load_base(setting.assistant, dtype, str(base.device))
            check_assistant(base, assistant, setting.assistant)
        self.answerer = Answerer(base, model, processor, setting, pad, system, frames, assistant)
        self.batch_size, self._longest, self._warm = int(batch_size), max_new_tokens, False

    def _place(self, device: str) -> str:
        """The device of this process: one of its own if several processes share the questions, otherwise `device`."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        self.accelerator = Accelerator()  # lmms-eval gathers by it
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        return str(self.accelerator.device)

    @property
    def device(self) -> torch.device:
        """The device on which lmms-eval puts tensors that processes exchange."""
        return self.answerer.base.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer questions in order, and log what that took.

        The tasks' stop strings are ignored, as lmms-eval's own chat models do: an answer ends where the base ends it. The first
        question of a run is answered once more before any time counts.

        Raises:
            TwigVLMError: a question cannot be asked; the message names it.
        """
        results: list[GenerationResult] = []
        batches: list[Answered] = []
        reset_peak(self.answerer.base.device)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answering") as bar:
            for chunk in _chunks(requests, self.batch_size):
                answered = self._answer(chunk, len(results))
                batches += answered
                new = [
                    GenerationResult(text, TokenCounts(input_tokens=asked, output_tokens=tokens))
                    for batch in answered
                    for text, asked, tokens in zip(batch.texts, batch.prompt_tokens, batch.tokens, strict=True)
                ]
                for request, result in zip(chunk, new, strict=True):
                    self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), result.text)
                results += new
                bar.update(len(chunk))
        if batches:
            seconds, tokens = sum(batch.seconds for batch in batches), sum(sum(batch.tokens) for batch in batches)
            figures = throughput(batches, peak(self.answerer.base.device))
            log_metrics(seconds, tokens, tokens / seconds, figures)
        return results

    def _answer(self, chunk: Sequence[Instance], draw: int) -> list[Answered]:
        _, _, options, doc_id, task, _ = chunk[0].args
        try:
            conversations = [self._conversation(request) for request in chunk]
            longest, sampling = self._generation(options)
            if not self._warm:
                self._warm = True
                self.answerer.answer(conversations[:1], longest, sampling)
            return self.answerer.answer(conversations, longest, sampling, draw)
        except TwigVLMError as error:
            raise TwigVLMError(f"task {task}, from question {doc_id} on: {error}") from None

    def _conversation(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return to_messages(doc_to_messages(self.task_dict[task][split][doc_id]))

    def _generation(self, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The longest answer, and arguments of `generate`, from a task's `generation_kwargs`."""
        if int(given.get("num_beams") or 1) > 1:
            raise TwigVLMError(
                f"num_beams={given['num_beams']}: beam search is not supported; add --gen_kwargs num_beams=1"
            )
        longest = int(given.get("max_new_tokens") or self._longest)
        sampled = given.get("do_sample", bool(given.get("temperature")))
        if not sampled:
            return longest, {"do_sample": False}
        chosen = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
        return longest, {"do_sample": True, **chosen}

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: pruning and drafting concern generated answers only."""
        raise NotImplementedError(
            "twigvlm: tasks that compare likelihoods are not supported; choose a generate_until task"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("twigvlm: tasks of several rounds are not supported; choose a generate_until task")


def _grow(hf_model: Any, pretrained: str, twig: str | None, setting: Setting) -> TwigVLM:
    if not setting.needs_twig and (twig is None or setting.speculate != "exit"):
        return without_twig(hf_model, exits=setting.speculate == "exit")
    twig = twig or default_twig(pretrained)
    assert twig is not None, "asked for before the base was loaded"
    return TwigVLM.from_pretrained(hf_model, twig)


def _chunks(requests: Sequence[Instance], size: int) -> Iterator[list[Instance]]:
    """Consecutive requests of the same task and options, at most `size` together."""
    for _, group in groupby(requests, key=lambda request: (request.args[4], request.args[2])):
        members = list(group)
        yield from (members[start : start + size] for start in range(0, len(members), size))
