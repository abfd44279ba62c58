"""TwigVLM: a frozen base and its twig, as one model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from twigvlm import checkpoint
from twigvlm.base.masks import check_tree_attention
from twigvlm.base.vlm import BaseVLM
from twigvlm.config import PruningConfig, SpeculationConfig, TwigConfig
from twigvlm.decoding.costs import StepCosts, calibrate
from twigvlm.decoding.loop import Answer, Stops, decode
from twigvlm.decoding.prefill import Plan, Scorer
from twigvlm.decoding.timing import Timings, clock_of
from twigvlm.errors import TwigVLMError
from twigvlm.hub import push
from twigvlm.pruning.budget import average_kept, solve_keep
from twigvlm.pruning.head_scores import default_scorer
from twigvlm.twig.block import Twig


@dataclass(frozen=True)
class TwigOutput:
    """What `generate(return_dict_in_generate=True)` returns."""

    sequences: Int[Tensor, "batch length"]
    """Prompt ids and new ids."""
    kept_indices: Int[Tensor, "batch kept"] | None
    """Prompt positions of the visual tokens kept after layer K, ascending; None without pruning."""
    drafted_lengths: list[int]
    """Tokens drafted for each step; of a tree, its nodes that were verified."""
    accepted_lengths: list[int]
    """Drafted tokens accepted in each step; each step adds one token of the base's own unless it ends the answer."""
    timings: Timings
    """Seconds of prefill, draft, verify and the whole."""
    costs: StepCosts | None
    """What `auto` reckoned with; None for other ways of speculation."""


class TwigVLM(nn.Module):
    """A frozen base VLM with a twig that prunes its visual tokens and drafts its answers.

    Only the twig is trainable. The base is used as it is: its parameters stop requiring gradients and it stays in
    evaluation mode; nothing else of it changes.
    """

    def __init__(self, base: BaseVLM, twig: Twig) -> None:
        super().__init__()
        self.model = base.model
        self.base = base
        self.twig = twig
        self.model.requires_grad_(False)
        self._disabled = False
        self._costs: dict[tuple[object, ...], StepCosts] = {}
        self.train(False)

    @classmethod
    def grow(
        cls,
        model: Any,
        config: TwigConfig | None = None,
        draft_token_ids: Int[Tensor, " draft_vocabulary"] | None = None,
    ) -> "TwigVLM":
        """Grow a fresh twig on a Hugging Face VLM.

        Args:
            model: the base; unmodified, any attention implementation.
            config: the twig's shape; None: the published one.
            draft_token_ids: ids that the twig can draft, `config.draft_vocabulary` many.

        Raises:
            TwigVLMError: the base is not supported, or the twig does not fit on it.
        """
        base = BaseVLM(model)
        twig = Twig(base, config or TwigConfig(), draft_token_ids)
        twig.open_gates(base)
        return cls(base, twig)

    @classmethod
    def from_pretrained(
        cls, model: Any, path: str | PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> "TwigVLM":
        """Load a twig onto the base that it grew on, in the base's dtype.

        Args:
            model: the base.
            path: directory of the twig, or its hub id.
            revision: branch, tag or commit of a hub id; None: the main branch.
            token: for a private repository; None: the one that you are logged in with.

        Raises:
            TwigVLMError: no twig at `path`, a twig of another base, a broken weight file, or the hub refuses.
        """
        base = BaseVLM(model)
        return cls(base, checkpoint.load(base, path, revision, token))

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Save the twig alone to a directory, with a model card; each file is replaced whole or not at all."""
        checkpoint.save(self.base, self.twig, path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload twig",
    ) -> str:
        """Save the twig to a repository of the hub, which is made if need be; returns its address.

        Args:
            repo_id: `user/name`.
            private: whether a new repository is private; None: as your account says.
            token: with the right to write; None: the one that you are logged in with.
            commit_message: of the upload.

        Raises:
            TwigVLMError: the hub refuses, or cannot be reached.
        """
        with TemporaryDirectory() as folder:
            checkpoint.save(self.base, self.twig, folder, name=repo_id)
            return push(Path(folder), repo_id, private, token, commit_message)

    @property
    def config(self) -> TwigConfig:
        """The twig's config."""
        return self.twig.config

    def train(self, mode: bool = True) -> "TwigVLM":
        """Set the twig's mode; the base stays in evaluation mode."""
        super().train(mode)
        self.model.train(False)
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context `generate` is the base's own `generate`, bit for bit."""
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        retain: float | None = None,
        keep: int | None = None,
        final_wipe: int | None = None,
        scorer: Scorer | None = None,
        speculate: str = "none",
        draft_length: int = 5,
        draft_threshold: float = 0.6,
        tree_depth: int = 4,
        tree_width: int = 10,
        tree_expand: int = 10,
        tree_nodes: int = 60,
        **kwargs: Any,
    ) -> Tensor | TwigOutput | Any:
        """Generate as the base's `generate` does, with pruning and speculation (greedy, one prompt).

        Args:
            inputs: prompt ids, or pass them as `input_ids`.
            retain: R̄, average number of visual tokens over all layers (Eq. 6).
            keep: R, visual tokens kept in layers K+1..K_f, instead of `retain`. Neither: no pruning.
            final_wipe: K_f; None: the twig's; the base's number of layers: off.
            scorer: ranks the visual tokens; None: the twig's P-Head, or without one its last layer's attention.
            speculate: "none", "chain", "tree", or "auto": drafts of what size it pays on this machine, none where none does; the
                first time it measures that for a second or so. The output is the same.
            draft_length: δ, most tokens of a chain.
            draft_threshold: θ, a chain ends after a token whose probability is below it.
            tree_depth: D, most tokens on a path of a tree.
            tree_width: E, children of each node that is expanded.
            tree_expand: K_sel, nodes of a level that are expanded.
            tree_nodes: N_max, most drafted tokens of a tree that are verified.
            kwargs: what the base's `generate` takes: processor outputs, max_new_tokens, generation_config,
                eos_token_id, logits_processor, stopping_criteria, streamer, return_dict_in_generate, …

        Returns:
            Prompt ids and new ids, [1, length]; with `return_dict_in_generate=True` a TwigOutput.

        Raises:
            TwigVLMError: an argument is out of range, does not apply or is not supported.
        """
        pruning = PruningConfig(retain, keep, final_wipe)
        speculation = SpeculationConfig(
            speculate,  # type: ignore[arg-type]
            draft_length,
            draft_threshold,
            tree_depth,
            tree_width,
            tree_expand,
            tree_nodes,
        )
        if scorer is not None and not pruning.active:
            raise TwigVLMError("scorer: needs a budget, give retain or keep too")
        if inputs is not None:
            if "input_ids" in kwargs:
                raise TwigVLMError("inputs and input_ids: give one of them")
            kwargs["input_ids"] = inputs
        if self._disabled:
            if pruning.active or speculation.active:
                raise TwigVLMError("retain, keep and speculate do not apply while the twig is disabled: leave them out")
            return self.model.generate(**kwargs)
        if speculation.speculate in ("tree", "auto"):
            check_tree_attention(self.base.attention)
        _check_arguments(kwargs, self.model.generation_config)
        self.base.check_images(kwargs["input_ids"], kwargs)
        costs = self.costs() if speculation.speculate == "auto" else None
        began = clock_of(self.model.device)()

        entered = False
        streamer = kwargs.get("streamer")
        tokenizer_stops = _stop_strings(kwargs)

        def run(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Tensor | TwigOutput:
            nonlocal entered
            entered = True
            _check_generation(generation_config)
            for name in ("past_key_values", "use_cache"):
                model_kwargs.pop(name, None)
            model_kwargs = {name: value for name, value in model_kwargs.items() if value is not None}
            with torch.inference_mode():
                answer = decode(
                    self.base,
                    self.twig,
                    {"input_ids": input_ids, **model_kwargs},
                    lambda visual: self._plan(visual, pruning, scorer),
                    speculation,
                    _stops(stopping_criteria, input_ids.shape[1]),
                    logits_processor if len(logits_processor) else None,
                    _emitter(streamer),
                    began,
                    costs,
                )
            if streamer is not None:
                streamer.end()
            return _output(input_ids, answer, costs, bool(generation_config.return_dict_in_generate))

        try:
            # The base's own `generate` merges configurations and builds processors and criteria; only its loop is ours.
            return self.model.generate(custom_generate=run, **tokenizer_stops, **kwargs)
        except ValueError as error:
            if entered or isinstance(error, TwigVLMError):
                raise
            raise TwigVLMError(" ".join(str(error).split())) from error

    def costs(self) -> StepCosts:
        """What the passes of a step cost here, measured the first time that it is asked for this way of running the base."""
        key = (self.base.dtype, self.model.device, self.base.attention, torch.get_num_threads())
        if key not in self._costs:
            self._costs[key] = calibrate(self.base, self.twig)
        return self._costs[key]

    def _plan(self, visual: int, pruning: PruningConfig, scorer: Scorer | None) -> Plan:
        layers, trunk = self.base.num_layers, self.config.trunk_layers
        keep, final_wipe = None, layers
        if pruning.active and visual:  # of a prompt of text alone there is nothing to prune
            final_wipe = next((k for k in (pruning.final_wipe, self.config.final_wipe) if k is not None), layers)
            if pruning.keep is not None:
                keep = pruning.keep
                average_kept(keep, visual, layers, trunk, final_wipe)  # for its errors
            elif pruning.retain is not None:
                keep = solve_keep(pruning.retain, visual, layers, trunk, final_wipe)
        return Plan(keep, final_wipe, scorer or default_scorer(self.twig))


def _check_arguments(kwargs: dict[str, Any], defaults: GenerationConfig) -> None:
    """Refuse, before any work, what this loop would otherwise have to drop."""
    if kwargs.get("input_ids") is None:
        raise TwigVLMError("input_ids is missing: pass the processor's outputs")
    if len(kwargs["input_ids"]) != 1:
        raise TwigVLMError(
            f"batch of {len(kwargs['input_ids'])} prompts: only one prompt at a time is supported yet; loop over them"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise TwigVLMError(
            f"attention_mask: hides {int((mask == 0).sum())} tokens; one prompt needs no padding, pass it without"
        )
    given = kwargs.get("generation_config")
    for config in (kwargs, vars(given) if given is not None else {}, vars(defaults)):
        if config.get("max_new_tokens") is not None:
            if config["max_new_tokens"] < 1:
                raise TwigVLMError(f"max_new_tokens={config['max_new_tokens']}: must be 1 or more")
            break
    for name in ("assistant_model", "custom_generate", "past_key_values", "inputs_embeds", "synced_gpus"):
        if kwargs.get(name) is not None:
            raise TwigVLMError(f"{name} is not supported with a twig: leave it out, or use model.disabled()")


def _check_generation(config: GenerationConfig) -> None:
    if config.do_sample:
        raise TwigVLMError("do_sample=True: only greedy decoding is supported yet; pass do_sample=False")
    if config.num_beams is not None and config.num_beams > 1:
        raise TwigVLMError(f"num_beams={config.num_beams}: only greedy decoding is supported yet; pass num_beams=1")
    if config.get_generation_mode() != GenerationMode.GREEDY_SEARCH:
        raise TwigVLMError(
            f"{config.get_generation_mode().value}: only greedy decoding is supported; leave its options out"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise TwigVLMError(f"{name}=True is not supported with a twig: leave it out, or use model.disabled()")
    if config.use_cache is False:
        raise TwigVLMError("use_cache=False: a twig needs the cache; leave it out")
    if config.cache_implementation is not None:
        raise TwigVLMError(
            f"cache_implementation={config.cache_implementation!r}: pruning needs its own cache; leave it out"
        )


def _stop_strings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Stop strings as a criterion: `generate` with a custom loop does not pass its tokenizer on."""
    tokenizer = kwargs.pop("tokenizer", None)
    strings = kwargs.pop("stop_strings", None)
    if strings is None:
        return {}
    if tokenizer is None:
        raise TwigVLMError("stop_strings: needs the tokenizer too, pass tokenizer=processor.tokenizer")
    from transformers.generation import StopStringCriteria

    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    return {"stopping_criteria": criteria}


def _stops(criteria: StoppingCriteriaList, prompt_length: int) -> Stops:
    """Split criteria into those that plain integers decide and those that must be asked."""
    length: int | None = None
    ends: set[int] = set()
    others = StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            length = criterion.max_length if length is None else min(length, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            ends.update(int(token) for token in criterion.eos_token_id.flatten().tolist())
        else:
            others.append(criterion)
    if length is None:
        raise TwigVLMError("max_new_tokens is not set: pass max_new_tokens")
    return Stops(length - prompt_length, frozenset(ends), others if len(others) else None)


def _emitter(streamer: Any) -> Callable[[int], None]:
    if streamer is None:
        return lambda token: None
    return lambda token: streamer.put(torch.tensor([token]))


def _output(input_ids: Tensor, answer: Answer, costs: StepCosts | None, as_dict: bool) -> Tensor | TwigOutput:
    sequences = torch.cat((input_ids, input_ids.new_tensor([answer.tokens])), dim=1)
    if not as_dict:
        return sequences
    kept = None if answer.kept is None else answer.kept.clone()
    return TwigOutput(sequences, kept, answer.drafted_lengths, answer.accepted_lengths, answer.timings, costs)
