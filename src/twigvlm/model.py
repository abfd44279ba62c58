"""TwigVLM: a frozen base and its twig, as one model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from twigvlm.base.cpu_linear import is_alone
from twigvlm.base.masks import check_mask_attention
from twigvlm.base.vlm import BaseVLM, is_refusal
from twigvlm.checkpoints import twig_files
from twigvlm.checkpoints.hub import push
from twigvlm.config import PruningConfig, SpeculationConfig, TwigConfig
from twigvlm.conversation import Conversation
from twigvlm.engine.engine import Engine
from twigvlm.engine.row import Row
from twigvlm.engine.runner import EagerRunner
from twigvlm.errors import TwigVLMError, one_line
from twigvlm.hf.generate import HFGenerateAdapter, Schedule, TwigOutput, check_arguments, run_rows, with_stop_strings
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.cut import Need, Pruner, schedule
from twigvlm.pruning.methods import make_pruner
from twigvlm.pruning.methods.pruning_head import default_scorer
from twigvlm.pruning.methods.scout import ScoutPruner
from twigvlm.pruning.methods.twig import TwigPruner
from twigvlm.pruning.refocus import check_refocus
from twigvlm.pruning.view import Scorer
from twigvlm.speculation.costs import StepCosts, cached_costs
from twigvlm.timing import Timings, clock_of
from twigvlm.twig.block import Twig

_RESERVE = 512  # new tokens that a cache has room for at first
_calibrating = Lock()
"""One for all models: calibrations at the same time would disturb each other."""
_disabled: ContextVar[tuple["TwigVLM", ...]] = ContextVar("twigvlm_disabled", default=())
"""Models whose twig is disabled in this thread or task."""


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
    def without_twig(cls, model: Any) -> "TwigVLM":
        """A Hugging Face VLM with pruning methods that need no trained twig; it drafts nothing.

        Its twig is a single untrained layer that never runs.

        Args:
            model: the base; unmodified, any attention implementation.

        Raises:
            TwigVLMError: the base is not supported.
        """
        return cls.grow(model, TwigConfig(trunk_layers=0, twig_layers=1, head="shared"))

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
        return cls(base, twig_files.load(base, path, revision, token))

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Save the twig alone to a directory, with a model card; each file is replaced whole or not at all."""
        twig_files.save(self.base, self.twig, path)

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
            twig_files.save(self.base, self.twig, folder, name=repo_id)
            return push(Path(folder), repo_id, private, token, commit_message)

    @property
    def config(self) -> Any:
        """The base's config, as transformers' own tools expect it; the twig's is `twig.config`."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The base's generation config: what `generate` does where it is not told otherwise."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's number format."""
        return cast(torch.dtype, self.model.dtype)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where accelerate put the base's modules.

        Raises:
            AttributeError: the base was not loaded with a `device_map`.
        """
        return cast(dict[str, Any], self.model.hf_device_map)

    @property
    def input_modalities(self) -> Any:
        """What the base takes, for example image and text."""
        return self.model.input_modalities

    @property
    def output_modalities(self) -> Any:
        """What the base makes: text."""
        return self.model.output_modalities

    def can_generate(self) -> bool:
        """True: `transformers.pipeline` asks."""
        return True

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Parameters of base and twig together.

        Args:
            only_trainable: count only those that are trained.
            exclude_embeddings: leave the base's embeddings out.
        """
        twig = sum(one.numel() for one in self.twig.parameters() if one.requires_grad or not only_trainable)
        return int(self.model.num_parameters(only_trainable, exclude_embeddings)) + twig

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, of how many, in one line as PEFT does."""
        trainable, total = self.num_parameters(only_trainable=True), self.num_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def train(self, mode: bool = True) -> "TwigVLM":
        """Set the twig's mode; the base stays in evaluation mode."""
        super().train(mode)
        self.model.train(False)
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context `generate` is the base's own `generate`, bit for bit; other threads and tasks keep the twig."""
        before = _disabled.get()
        _disabled.set((*before, self))
        try:
            yield
        finally:
            # Not by the token of `set`: what opens a context may close it elsewhere, as fixtures and dependencies do.
            _disabled.set(before)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        retain: float | None = None,
        keep: int | None = None,
        final_wipe: int | None = None,
        retain_per_image: bool = False,
        refocus: float | None = None,
        scout: bool = False,
        scorer: Scorer | None = None,
        pruner: Pruner | str | None = None,
        speculate: str = "none",
        draft_length: int = 5,
        draft_threshold: float = 0.6,
        tree_depth: int = 4,
        tree_width: int = 10,
        tree_expand: int = 10,
        tree_nodes: int = 60,
        generator: torch.Generator | None = None,
        memory: PrefixCache | None = None,
        **kwargs: Any,
    ) -> Tensor | TwigOutput | Any:
        """Generate as the base's `generate` does, greedily or by sampling, with pruning and speculation.

        Each prompt of a batch (padded on the left) gets the answer that it would get alone; Hugging Face's
        processors and criteria see it without its padding. The caller's own see the whole padded batch, once per
        position, and the rows of such a batch advance together. Sampling draws as the base's `generate` would: the
        same seed gives the same answer, however it is speculated. In a batch each row draws from a stream of its own.

        Args:
            inputs: prompt ids, or pass them as `input_ids`.
            retain: R̄, average number of visual tokens over all layers (Eq. 6).
            keep: R, visual tokens kept in layers K+1..K_f, instead of `retain`. Neither: no pruning.
            final_wipe: K_f; None: the twig's; the base's number of layers: off.
            retain_per_image: split the budget evenly among a prompt's images, or the frames that text parts.
            refocus: τ, exchange kept visual tokens for better ones, while the answer grows, wherever they have less than this
                share of the scores that as many others could have; None: they stay the same.
            scout: rank by a pass of trunk and twig over the whole prompt before the decoder, all of whose layers then hold the
                kept tokens alone: R̄ = R + M·K/L, and no FinalWipe.
            scorer: ranks the visual tokens; None: the twig's P-Head, or without one its last layer's attention.
            pruner: another pruning method, by its name (`twigvlm methods`) under the budget `retain`, or as an object, which may
                have cuts of its own; None, "twig": the twig's.
            speculate: "none", "chain", "tree", or "auto": drafts of what size it pays on this machine, none where none does; the
                first time on a machine it measures that for a few seconds (see `calibrate`). The output is the same.
            draft_length: δ, most tokens of a chain.
            draft_threshold: θ, a chain ends after a token whose probability is below it.
            tree_depth: D, most tokens on a path of a tree.
            tree_width: E, children of each node that is expanded.
            tree_expand: K_sel, nodes of a level that are expanded.
            tree_nodes: N_max, most drafted tokens of a tree that are verified.
            generator: what sampling draws from; None: torch's own, which `torch.manual_seed` seeds.
            memory: of a conversation, whose next prompt this is (one prompt, one answer); `chat` keeps one.
            kwargs: what the base's `generate` takes: processor outputs, max_new_tokens, generation_config,
                eos_token_id, logits_processor, stopping_criteria, streamer, return_dict_in_generate, …

        Returns:
            Prompt ids and new ids, [batch, length]; with `return_dict_in_generate=True` a TwigOutput.

        Raises:
            TwigVLMError: an argument is out of range, does not apply or is not supported.
        """
        name = pruner if isinstance(pruner, str) else None
        pruning = PruningConfig(retain, keep, final_wipe, retain_per_image, refocus, name, scout)
        pruner = _by_name(pruner)
        speculation = SpeculationConfig(
            speculate,  # type: ignore[arg-type]
            draft_length,
            draft_threshold,
            tree_depth,
            tree_width,
            tree_expand,
            tree_nodes,
        )
        if inputs is not None:
            if "input_ids" in kwargs:
                raise TwigVLMError("inputs and input_ids: give one of them")
            kwargs["input_ids"] = inputs
        if self in _disabled.get():
            if pruning.active or pruner is not None or speculation.active:
                raise TwigVLMError("retain, keep and speculate do not apply while the twig is disabled: leave them out")
            if generator is not None:
                raise TwigVLMError(
                    "generator: the base's own generate takes none; leave it out, and seed by torch.manual_seed"
                )
            return self.model.generate(**kwargs)
        check_arguments(kwargs, self.model.generation_config)
        self._check_attention(speculation, len(kwargs["input_ids"]))
        self.base.check_images(kwargs["input_ids"], kwargs)
        looks = pruner is not None and Need.VISION in pruner.needs
        if memory is not None and not looks and not memory.needs_vision(self.base, kwargs["input_ids"]):
            kwargs = self.base.without_pixels(kwargs)
        costs = self.costs() if speculation.speculate == "auto" else None
        clock = clock_of(self.model.device)
        start_time = clock()
        try:
            adapter = self._rows(pruning, scorer, pruner, generator, memory, kwargs)
            timings = Timings(prefill=clock() - start_time) if adapter.config.return_dict_in_generate else None
            runner = EagerRunner(
                self.base, self.twig, speculation, costs, min(_RESERVE, adapter.rows[0].max_new_tokens)
            )
            output = run_rows(Engine(runner, timings=timings), adapter, timings, costs)
        except BaseException:
            if memory is not None:
                memory.forget()  # it may have taken in what the conversation will not hold
            raise
        if timings is not None:
            timings.total = clock() - start_time
        return output

    def engine(
        self, max_rows: int | None = None, max_bytes: int | None = None, speculate: str = "none", **options: Any
    ) -> Engine:
        """An engine that answers several requests at once: they join while others decode, and leave when they end.

        `engine.add(inputs, ...)` takes what `generate` takes, except for the options of speculation, which are the engine's.

        Args:
            max_rows: requests that decode together at most; None: as many as memory allows.
            max_bytes: of keys and values; None: what is free on an accelerator, half of the machine's memory otherwise.
            speculate: how to draft, as in `generate`.
            options: δ, θ, D, E, K_sel and N_max, by the names that `generate` gives them.

        Raises:
            TwigVLMError: an option is out of range or does not apply.
        """
        speculation = SpeculationConfig(speculate, **options)  # type: ignore[arg-type]
        self._check_attention(speculation, rows=2)
        costs = self.costs() if speculation.speculate == "auto" else None
        runner = EagerRunner(self.base, self.twig, speculation, costs, _RESERVE)
        return Engine(runner, self._row, max_rows, max_bytes)

    def _row(
        self,
        inputs: dict[str, Any],
        *,
        retain: float | None = None,
        keep: int | None = None,
        final_wipe: int | None = None,
        retain_per_image: bool = False,
        refocus: float | None = None,
        scout: bool = False,
        scorer: Scorer | None = None,
        pruner: Pruner | str | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Row:
        """The row of one request to an engine."""
        name = pruner if isinstance(pruner, str) else None
        pruning = PruningConfig(retain, keep, final_wipe, retain_per_image, refocus, name, scout)
        pruner = _by_name(pruner)
        kwargs = {**inputs, **kwargs}
        check_arguments(kwargs, self.model.generation_config)
        self.base.check_images(kwargs["input_ids"], kwargs)
        adapter = self._rows(pruning, scorer, pruner, generator, None, kwargs)
        if len(adapter.rows) > 1:
            raise TwigVLMError(f"{len(adapter.rows)} answers: add requests one by one")
        return adapter.rows[0]

    def _check_attention(self, speculation: SpeculationConfig, rows: int) -> None:
        if speculation.speculate in ("tree", "auto"):
            check_mask_attention(self.base.attention, f"speculate={speculation.speculate!r}")
        if rows > 1:
            check_mask_attention(self.base.attention, f"batch of {rows} prompts")

    def _rows(
        self,
        pruning: PruningConfig,
        scorer: Scorer | None,
        pruner: Pruner | None,
        generator: torch.Generator | None,
        prefix: PrefixCache | None,
        kwargs: dict[str, Any],
    ) -> HFGenerateAdapter:
        """What the base's own `generate` makes of its arguments: rows for an engine."""
        pruner, schedule = self._pruning(pruning, scorer, pruner)
        looks = pruner is not None and Need.VISION in pruner.needs
        with torch.inference_mode(), self.base.watch_vision() if looks else nullcontext() as vision:
            adapter = HFGenerateAdapter(
                self.base, pruner, schedule, pruning.refocus, kwargs.get("streamer"), generator, prefix, vision
            )
            try:
                self.model.generate(custom_generate=adapter, **with_stop_strings(kwargs, self.model.generation_config))
            except Exception as error:
                if adapter.entered or not is_refusal(error):
                    raise
                if isinstance(error, ValueError):
                    raise TwigVLMError(one_line(error)) from error
                if not any(visual.grid for visual in self.base.family.visuals):
                    raise
                # Families with grids lay out the positions of images before the adapter is called.
                raise TwigVLMError(f"the base refuses this prompt: {one_line(error)}") from error
        return adapter

    def chat(self, processor: Any, **options: Any) -> Conversation:
        """A conversation of several turns, in which trunk and twig run only once on each token.

        Args:
            processor: the base's.
            options: of `generate`, for every question.
        """
        return Conversation(self.base, self.generate, processor, options)

    def calibrate(self) -> StepCosts:
        """Measure what the passes of a step cost on this machine, now and whatever was known; `auto` drafts by it.

        The result is kept in a file of this machine and model, so that no later process measures again. Call it on an idle
        machine, for example once after installation: without it, the first use of `auto` measures.
        """
        with _calibrating:
            costs = self._costs[self._costs_key()] = cached_costs(self.base, self.twig, refresh=True)
        return costs

    def costs(self) -> StepCosts:
        """What the passes of a step cost here: as calibrated before, by this process or another one, or else measured now."""
        with _calibrating:  # concurrent first calls measure once
            key = self._costs_key()
            if key not in self._costs:
                self._costs[key] = cached_costs(self.base, self.twig)
            return self._costs[key]

    def _costs_key(self) -> tuple[object, ...]:
        # Less than what a file goes by, which takes milliseconds to find out.
        return self.base.dtype, self.model.device, self.base.attention, torch.get_num_threads(), is_alone()

    def _pruning(
        self, pruning: PruningConfig, scorer: Scorer | None, pruner: Pruner | None
    ) -> tuple[Pruner | None, Schedule]:
        """What prunes, and its cuts for a number of visual tokens."""
        layers, retain = self.base.num_layers, pruning.retain
        if scorer is not None and not pruning.active:
            raise TwigVLMError("scorer: needs a budget, give retain or keep too")
        if pruner is not None:
            others = (
                ("keep", pruning.keep),
                ("final_wipe", pruning.final_wipe),
                ("scorer", scorer),
                ("refocus", pruning.refocus),
                ("scout", pruning.scout or None),
            )
            for name, value in (*others, ("retain_per_image", pruning.retain_per_image or None)):
                if value is not None:
                    raise TwigVLMError(f"{name}: belongs to the twig's own pruning; leave it out beside pruner")
        elif not pruning.active:
            return None, lambda visual: ()
        elif pruning.scout:
            ranking = scorer or default_scorer(self.twig)
            pruner = ScoutPruner(self.twig, ranking, pruning.keep, pruning.retain_per_image)
        else:
            final_wipe = next((k for k in (pruning.final_wipe, self.twig.config.final_wipe) if k is not None), layers)
            ranking = scorer or default_scorer(self.twig)
            pruner = TwigPruner(
                ranking, self.twig.config.trunk_layers, final_wipe, pruning.keep, pruning.retain_per_image
            )
        if pruning.refocus is not None:
            check_refocus(pruning.refocus, pruner, self.base, self.twig)
        return pruner, lambda visual: schedule(pruner, retain, visual, layers)


def _by_name(pruner: Pruner | str | None) -> Pruner | None:
    """A pruner as it was given; None: the twig's own."""
    if isinstance(pruner, str):
        return None if pruner == "twig" else make_pruner(pruner)
    return pruner
