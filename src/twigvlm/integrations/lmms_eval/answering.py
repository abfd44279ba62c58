"""Answers to a harness's questions, with what they took: one pruning and one way to draft for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from PIL import Image

from twigvlm.base.vlm import BaseVLM
from twigvlm.config import WITHOUT_TWIG, SpeculationConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.batches import up_to_end
from twigvlm.evaluation.speed import FirstToken
from twigvlm.evaluation.variants import is_diverse, is_published, make_variants, refocus_of, scorer_of
from twigvlm.images import load_image
from twigvlm.inputs import Message, build_inputs, media
from twigvlm.model import TwigVLM
from twigvlm.pruning.methods import make_pruner
from twigvlm.timing import clock_of


@dataclass(frozen=True)
class Setting:
    """How all questions are answered."""

    method: str = "none"
    """none, or a method of `twigvlm evaluate accuracy`."""
    retain: float | str | None = None
    """R̄, or a share of each prompt's visual tokens such as "33.3%"; None for none alone."""
    speculate: str = "none"
    """How to draft, as in `TwigVLM.generate`."""
    final_wipe: int | None = None
    """K_f, for methods that rank under the twig's cuts; None: as the twig was tuned."""
    final_share: float | None = None
    """φ, for the same methods; None: as the twig was tuned."""
    seed: int = 0
    """Of `random` and `random:LAYER`."""
    drafting: Mapping[str, float] = field(default_factory=dict)
    """Further options of `speculate`, by the names that `TwigVLM.generate` gives them."""

    def __post_init__(self) -> None:
        if (self.method == "none") != (self.retain is None):
            raise TwigVLMError(f"method={self.method}, retain={self.retain}: a method and a budget go together")
        for name, value in (("final_wipe", self.final_wipe), ("final_share", self.final_share)):
            if value is not None and (self.method in ("none", "scout") or is_published(self.method)):
                raise TwigVLMError(f"{name}={value:g}: does not apply to method={self.method}; leave it out")
        known = {one.name for one in dataclasses.fields(SpeculationConfig)} - {"speculate"}
        if unknown := self.drafting.keys() - known:
            raise TwigVLMError(f"model argument {', '.join(sorted(unknown))}: is unknown; see docs/lmms-eval.md")
        SpeculationConfig(self.speculate, **self.drafting)  # type: ignore[arg-type]
        self.budget(1000)

    @property
    def needs_twig(self) -> bool:
        """Whether a trained twig takes part."""
        return not (self.method == "none" or is_published(self.method)) or self.speculate not in WITHOUT_TWIG

    @property
    def is_base(self) -> bool:
        """Whether the base's own `generate` answers."""
        return self.method == "none" and self.speculate == "none"

    def budget(self, visual: int) -> float | None:
        """R̄ for a prompt of that many visual tokens; None where it has no more than the budget, so that all of them stay."""
        if self.retain is None:
            return None
        number, share = str(self.retain).removesuffix("%"), str(self.retain).endswith("%")
        value = -1.0
        with suppress(ValueError):
            value = float(number)
        if not (isfinite(value) and value > 0) or (share and value > 100):
            raise TwigVLMError(f"retain={self.retain}: must be a number of visual tokens, or a share such as 33.3%")
        retain = value * visual / 100 if share else value
        return retain if retain < visual else None


@dataclass(frozen=True)
class Answered:
    """Prompts that were answered together."""

    texts: list[str]
    tokens: list[int]
    """New tokens of each answer, its end token included."""
    prompt_tokens: list[int]
    visual: list[int]
    """M, visual tokens of each prompt."""
    average_visual: list[float]
    """R̄ of each prompt, as it was."""
    seconds: float
    """From the inputs to the last answer's end: vision, prompt and decoding, of all of them together."""
    first_token: float | None
    """Seconds until the first token; None where it is not to be had."""
    drafted: int
    accepted: int
    passes: int
    """Steps in which the base verified drafts, of all prompts; 0 where that is not known."""


@dataclass(frozen=True)
class Answerer:
    """A base with or without a twig that answers conversations in one setting.

    Args:
        base: the base.
        model: the same with its twig, or for methods without one; None: the base's own `generate` answers.
        processor: the base's.
        setting: how.
        pad: whether pictures are padded to squares with the processor's mean colour, as LLaVA-1.5's evaluation does.
        system: text of a message before each question; empty: none.
        frames: of a video; None: as the processor does.
    """

    base: BaseVLM
    model: TwigVLM | None
    processor: Any
    setting: Setting
    pad: bool = False
    system: str = ""
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.setting.method != "none":
            # For its errors: an unknown method, or a layer that the base does not have.
            make_variants(self.model, [self.setting.method], [1.0])

    def answer(
        self, conversations: Sequence[Sequence[Message]], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> list[Answered]:
        """The answers to conversations: in one batch, or one by one where their budgets differ.

        Args:
            conversations: each ends with a question.
            max_new_tokens: longest answer.
            sampling: `do_sample` and what belongs to it, as of `generate`.

        Raises:
            TwigVLMError: a picture or a text is refused, or a prompt cannot have the budget.
        """
        prepared = [self._prepare(messages) for messages in conversations]
        video = any(True for messages in prepared for _ in media(messages, "video"))
        if video and getattr(self.processor, "video_processor", None) is None:
            raise TwigVLMError("video: this base takes none; choose one of 'twigvlm families' that does")
        sampled = video and self.frames is not None
        options = {"num_frames": self.frames, "do_sample_frames": True} if sampled else {}
        device, dtype = self.base.device, self.base.dtype
        inputs = build_inputs(self.processor, prepared, device, dtype, **options)
        visual = [int(count) for count in self.base.visual_mask(inputs["input_ids"]).sum(dim=1)]
        budgets = {self.setting.budget(count) for count in visual}
        if len(budgets) > 1:
            return [one for single in conversations for one in self.answer([single], max_new_tokens, sampling)]
        (budget,) = budgets
        return [self._generate(inputs, visual, {"max_new_tokens": max_new_tokens, **sampling}, budget)]

    def _prepare(self, messages: Sequence[Message]) -> list[Message]:
        system = [{"role": "system", "content": [{"type": "text", "text": self.system}]}] if self.system else []
        if not self.pad:
            return [*system, *messages]
        means = getattr(self.processor.image_processor, "image_mean", None)
        if means is None:
            raise TwigVLMError("pad: this base's processor names no mean colour; leave it out")
        colour = [int(255 * mean) for mean in means]

        def squared(part: Message) -> Message:
            return {**part, "image": to_square(load_image(part["image"]), colour)} if part["type"] == "image" else part

        return [*system, *({**one, "content": [squared(part) for part in one["content"]]} for one in messages)]

    def _generate(
        self, inputs: dict[str, Any], visual: list[int], options: dict[str, Any], budget: float | None
    ) -> Answered:
        clock = clock_of(self.base.device)
        # The base's own generate takes a streamer for a single prompt only.
        watch = FirstToken(clock) if self.model is None and len(visual) == 1 else None
        generate = self.base.model.generate if self.model is None else self.model.generate
        began = clock()
        output: Any = generate(
            **inputs, **options, **self._options(budget), return_dict_in_generate=True, streamer=watch
        )
        seconds = clock() - began
        first = None if watch is None or watch.at is None else watch.at - began
        new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        new = up_to_end(new, self.base.model.generation_config)
        drafted = accepted = passes = 0
        averages = [float(count) for count in visual]
        if self.model is not None:
            first, averages = output.timings.prefill, output.average_visual
            drafted, accepted = (sum(map(sum, each)) for each in (output.drafted_lengths, output.accepted_lengths))
            passes = sum(count > 0 for row in output.drafted_lengths for count in row)
        return Answered(
            [self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new],
            [len(ids) for ids in new],
            [int(count) for count in inputs["attention_mask"].sum(dim=1)],
            visual,
            list(averages),
            seconds,
            first,
            drafted,
            accepted,
            passes,
        )

    def _options(self, budget: float | None) -> dict[str, Any]:
        """Of `generate`."""
        setting, method = self.setting, self.setting.method
        if self.model is None:
            return {}
        drafts = {"speculate": setting.speculate, **setting.drafting}
        if budget is None:
            return drafts
        if is_published(method):
            return {**drafts, "retain": budget, "pruner": make_pruner(method, setting.seed)}
        if method == "scout":
            return {**drafts, "retain": budget, "scout": True}
        twig = {**drafts, "retain": budget, "final_wipe": setting.final_wipe, "final_share": setting.final_share}
        if (coverage := refocus_of(method)) is not None:
            return {**twig, "refocus": coverage, "diverse": is_diverse(method)}
        if method == "diverse":
            return {**twig, "diverse": True}
        return {**twig, "scorer": scorer_of(method, self.model, setting.seed)}


def to_square(image: Image.Image, colour: Sequence[int]) -> Image.Image:
    """A picture in the middle of the smallest square that holds it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(colour))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
