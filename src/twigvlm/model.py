"""TwigVLM: a frozen base and its twig, as one model."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import partial
from os import PathLike
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from twigvlm.base.vlm import BaseVLM
from twigvlm.checkpoints import twig_files
from twigvlm.config import PruningConfig, SpeculationConfig, TwigConfig
from twigvlm.conversation import Conversation
from twigvlm.engine.calibrated import Calibrated
from twigvlm.engine.engine import Engine
from twigvlm.engine.runner import Runner
from twigvlm.errors import TwigVLMError
from twigvlm.hf.checks import check_arguments, check_memory
from twigvlm.hf.generate import TwigOutput, run_rows
from twigvlm.hf.interface import HFInterface
from twigvlm.hf.requests import request_row, rows_of
from twigvlm.kv.prefix_cache import PrefixCache
from twigvlm.pruning.cut import Pruner
from twigvlm.pruning.view import Scorer
from twigvlm.speculation.build import check_speculation
from twigvlm.timing import Timings, clock_of
from twigvlm.twig.block import Twig

_RESERVE = 256  # new tokens that a cache has room for at first
_disabled: ContextVar[tuple["TwigVLM", ...]] = ContextVar("twigvlm_disabled", default=())
"""Models whose twig is disabled in this thread or task."""


class TwigVLM(HFInterface, Calibrated):
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
            model: the base; unmodified, with `sdpa`, `eager` or FlashAttention.
            config: shape of the twig; None: K and T as published, without a P-Head and without FinalWipe.
            draft_token_ids: ids of the tokens that the twig can draft, as many as `config.draft_vocabulary`.

        Raises:
            TwigVLMError: the base is not supported, or the twig does not fit on it.
        """
        base = BaseVLM(model)
        twig = Twig(base, config or TwigConfig(), draft_token_ids)
        twig.open_gates(base)
        return cls(base, twig)

    @classmethod
    def without_twig(cls, model: Any, trunk_layers: int = 0) -> "TwigVLM":
        """A Hugging Face VLM with pruning methods and ways to draft that need no trained twig.

        It has a single untrained layer in a twig's place, which never runs: what needs a twig is refused.

        Args:
            model: the base; unmodified, with `sdpa`, `eager` or FlashAttention.
            trunk_layers: K, the layers that draft by early exit.

        Raises:
            TwigVLMError: the base is not supported, or has no more than K layers.
        """
        grown = cls.grow(model, TwigConfig(trunk_layers, twig_layers=1, head="shared"))
        grown.twig.is_stand_in = True
        return grown

    @classmethod
    def from_pretrained(
        cls, model: Any, path: str | PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> "TwigVLM":
        """Load a twig onto the base that it grew on, in the base's dtype.

        Args:
            model: the base.
            path: directory of the twig, or its hub id.
            revision: branch, tag or commit of a hub id; None: the main branch.
            token: for a private repository; None: the token of your login.

        Raises:
            TwigVLMError: there is no twig at `path`, it belongs to another base, a weight file is broken, or the hub refuses.
        """
        base = BaseVLM(model)
        return cls(base, twig_files.load(base, path, revision, token))

    def train(self, mode: bool = True) -> "TwigVLM":
        """Set the twig's mode; the base stays in evaluation mode."""
        super().train(mode)
        self.model.train(False)
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context, `generate` is the base's own `generate`, bit for bit. Other threads and tasks keep the twig."""
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
        final_share: float | None = None,
        retain_per_image: bool = False,
        refocus: float | None = None,
        scout: bool = False,
        diverse: bool = False,
        scorer: Scorer | None = None,
        pruner: Pruner | str | None = None,
        speculate: str = "none",
        draft_length: int = 5,
        draft_threshold: float = 0.6,
        tree_depth: int = 4,
        tree_width: int = 10,
        tree_expand: int = 10,
        tree_nodes: int = 60,
        lookup_ngram: int = 3,
        generator: torch.Generator | None = None,
        memory: PrefixCache | None = None,
        **kwargs: Any,
    ) -> Tensor | TwigOutput | Any:
        """Generate like the base's `generate`, greedily or by sampling, with pruning and speculation.

        In float32, each prompt of a batch (padded on the left) gets the answer that it would get alone. Hugging Face's own
        processors and criteria see it without its padding. The caller's processors and criteria see the whole padded batch,
        once per position, and the rows of such a batch advance together. With one prompt, in float32 and without pruning,
        sampling draws exactly the tokens that the base's own `generate` draws with the same seed, whichever way of drafting
        is used. In a batch, each row has its own random stream, so the draws differ from those of Hugging Face.

        Args:
            inputs: prompt ids; they can also be passed as `input_ids`.
            retain: R̄, the number of visual tokens averaged over all layers (Eq. 6).
            keep: R, the number of visual tokens kept in layers K+1..K_f, instead of `retain`. With neither, nothing is pruned.
            final_wipe: K_f, the layer after which visual tokens leave; None: the twig's own; the base's number of layers: off.
            final_share: φ, the share of the kept tokens, those with the highest scores, that stay after layer K_f; None: the
                twig's own.
            retain_per_image: split the budget evenly among a prompt's images, or frames with text between them.
            refocus: τ; while the answer grows, kept visual tokens are replaced by better ones whenever their scores add up to
                less than this share of the highest possible sum; None: they stay the same.
            scout: rank by a pass of trunk and twig over the whole prompt before the decoder, whose layers then all hold
                only the kept tokens: R̄ = R + M·K/L, without FinalWipe.
            diverse: keep visual tokens with high scores that also differ from each other.
            scorer: function that scores the visual tokens; None: the twig's P-Head, or its last layer's attention if it has none.
            pruner: another pruning method, by name (`twigvlm methods`) with the budget `retain`, or as an object, which may
                have its own cuts; None or "twig": the twig's.
            speculate: "none", "chain", "tree", or "auto", which drafts as much as pays off on this machine, or nothing; on
                its first use on a machine it measures for a few seconds (see `calibrate`). "lookup" and "exit" need no twig:
                "lookup" drafts what followed the newest tokens where they occurred before, in the prompt or the answer, and
                "exit" drafts chains by the base's own head on the states after layer K. In float32 the output is the same
                for all.
            draft_length: δ, length of the longest chain, or of what is looked up.
            draft_threshold: θ; a chain ends after a token whose probability is below it.
            tree_depth: D, length of the longest path of a tree.
            tree_width: E, number of children of each expanded node.
            tree_expand: K_sel, number of nodes of each level that are expanded.
            tree_nodes: N_max, largest number of drafted tokens of a tree that are verified.
            lookup_ngram: n, largest number of newest tokens that "lookup" finds again.
            generator: random generator for sampling; None: torch's global one, which `torch.manual_seed` seeds.
            memory: prefix cache of the conversation that this prompt continues (one prompt, one answer); see `chat`.
            kwargs: arguments of the base's `generate`: processor outputs, max_new_tokens, generation_config,
                eos_token_id, logits_processor, stopping_criteria, streamer, return_dict_in_generate, …

        Returns:
            Prompt ids followed by new ids, [batch, length]; a TwigOutput with `return_dict_in_generate=True`.

        Raises:
            TwigVLMError: an argument is out of range, does not apply or is not supported.
        """
        name = pruner if isinstance(pruner, str) else None
        pruning = PruningConfig(
            retain=retain,
            keep=keep,
            final_wipe=final_wipe,
            final_share=final_share,
            retain_per_image=retain_per_image,
            refocus=refocus,
            pruner=name,
            scout=scout,
            diverse=diverse,
        )
        speculation = SpeculationConfig(
            speculate=speculate,  # type: ignore[arg-type]
            draft_length=draft_length,
            draft_threshold=draft_threshold,
            tree_depth=tree_depth,
            tree_width=tree_width,
            tree_expand=tree_expand,
            tree_nodes=tree_nodes,
            lookup_ngram=lookup_ngram,
        )
        if inputs is not None:
            if "input_ids" in kwargs:
                raise TwigVLMError("inputs and input_ids: give only one of them")
            kwargs["input_ids"] = inputs
        if self in _disabled.get():
            if pruning.active or pruner is not None or scorer is not None or speculation.active:
                raise TwigVLMError(
                    "retain, keep, pruner, scorer and speculate do not apply while the twig is disabled: leave them out"
                )
            if generator is not None:
                raise TwigVLMError(
                    "generator: the base's own generate takes none; leave it out, and seed by torch.manual_seed"
                )
            return self.model.generate(**kwargs)
        check_arguments(kwargs, self.model.generation_config)
        check_speculation(speculation, self.base, self.twig, len(kwargs["input_ids"]))
        self.base.check_images(kwargs["input_ids"], kwargs)
        check_memory(memory, kwargs)
        costs = self.costs() if speculation.speculate == "auto" else None
        clock = clock_of(self.model.device)
        start_time = clock()
        try:
            adapter = rows_of(self.base, self.twig, pruning, scorer, pruner, generator, memory, kwargs)
            timings = Timings(prefill=clock() - start_time) if adapter.config.return_dict_in_generate else None
            runner = Runner(self.base, self.twig, speculation, costs, min(_RESERVE, adapter.rows[0].max_new_tokens))
            output = run_rows(Engine(runner, timings=timings), adapter, timings)
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
        """An engine that answers several requests at once. Requests join while others decode, and leave when they end.

        `engine.add(inputs, ...)` takes the arguments of `generate`, except for speculation, which is set for the whole engine.

        Args:
            max_rows: largest number of requests that decode together; None: as many as memory allows.
            max_bytes: memory for keys and values; None: nine tenths of what is free on an accelerator, or half
                of the machine's memory.
            speculate: how to draft, as in `generate`.
            options: δ, θ, D, E, K_sel, N_max and n, under the names that they have in `generate`.

        Raises:
            TwigVLMError: an option is out of range or does not apply.
        """
        if unknown := options.keys() - {option.name for option in fields(SpeculationConfig)}:
            raise TwigVLMError(
                f"{', '.join(sorted(unknown))}: no option of an engine; give those of an answer to engine.add"
            )
        speculation = SpeculationConfig(speculate, **options)  # type: ignore[arg-type]
        check_speculation(speculation, self.base, self.twig, rows=1 if max_rows == 1 else 2)
        costs = self.costs() if speculation.speculate == "auto" else None
        runner = Runner(self.base, self.twig, speculation, costs, _RESERVE)
        return Engine(runner, partial(request_row, self.base, self.twig), max_rows, max_bytes)

    def chat(self, processor: Any, **options: Any) -> Conversation:
        """Start a conversation of several turns, in which trunk and twig run only on what a prompt adds to the one before.

        Args:
            processor: the base's processor.
            options: arguments of `generate` for every question.
        """
        return Conversation(self.base, self.generate, processor, options)
