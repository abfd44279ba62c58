"""Answer the questions of a harness such as lmms-eval, all with one pruning and one way to draft, and measure the cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, get_args

from PIL import Image

from twigvlm.base.vlm import BaseVLM
from twigvlm.config import WITHOUT_TWIG, Speculate, SpeculationConfig
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.assisted import AssistedSteps, assisted_generation, prompt_lookup
from twigvlm.evaluation.batches import up_to_end
from twigvlm.evaluation.methods import parse_method, parse_methods
from twigvlm.evaluation.speed import FirstToken
from twigvlm.images import load_image
from twigvlm.inputs import Message, build_inputs, media
from twigvlm.model import TwigVLM
from twigvlm.pruning.budget import average_kept
from twigvlm.timing import clock_of

HF_LOOKUP_OPTION, HF_DRAFT = "hf-lookup", "draft:"
"""Ways to draft with the base's own `generate`: prompt lookup, or a small model whose id or directory follows the colon."""


@dataclass(frozen=True)
class Setting:
    """How all questions are answered."""

    method: str = "none"
    """Pruning method of `twigvlm methods`, or none."""
    retain: float | str | None = None
    """R̄, or a share of each prompt's visual tokens such as "33.3%"; None for none alone."""
    speculate: str = "none"
    """How to draft, as in `TwigVLM.generate`, or without pruning by the base's own `generate`: `HF_LOOKUP_OPTION`, or `HF_DRAFT`
    with a small model."""
    final_wipe: int | None = None
    """K_f, for methods that rank under the twig's cuts; None: as the twig was tuned."""
    final_share: float | None = None
    """φ, for the same methods; None: as the twig was tuned."""
    seed: int = 0
    """Seed of the methods `random` and `random:LAYER`."""
    drafting: Mapping[str, float] = field(default_factory=dict)
    """Further options of `speculate`, by the names that `TwigVLM.generate` gives them."""

    def __post_init__(self) -> None:
        if (self.method == "none") != (self.retain is None):
            raise TwigVLMError(
                f"method={self.method}, retain={self.retain}: a method and a budget go together; give both, or neither"
            )
        method = parse_method(self.method)
        for name, value in (("final_wipe", self.final_wipe), ("final_share", self.final_share)):
            if value is not None and (method.ranking == "none" or method.has_own_cuts):
                raise TwigVLMError(f"{name}={value:g}: does not apply to method={self.method}; leave it out")
        known = {one.name for one in dataclasses.fields(SpeculationConfig)} - {"speculate"}
        if unknown := self.drafting.keys() - known:
            raise TwigVLMError(f"model argument {', '.join(sorted(unknown))}: is unknown; see docs/lmms-eval.md")
        self._check_speculate()
        self.budget(1000)

    def _check_speculate(self) -> None:
        if self.assisted and self.method != "none":
            raise TwigVLMError(
                f"speculate={self.speculate}: drafts for the base's own generate, which prunes nothing; leave out method and "
                f"retain, or draft by one of {', '.join(get_args(Speculate)[1:])}"
            )
        if self.assistant is not None:
            if not self.assistant:
                raise TwigVLMError(
                    f"speculate={HF_DRAFT}: names no model; give its id or directory, as in {HF_DRAFT}ORG/SMALL"
                )
            if self.drafting:
                raise TwigVLMError(
                    f"{', '.join(self.drafting)}: does not apply to speculate={self.speculate}, since transformers decides how "
                    "much the model drafts; leave it out"
                )
        elif self.speculate == HF_LOOKUP_OPTION:
            SpeculationConfig("lookup", **self.drafting)  # type: ignore[arg-type]
        elif self.speculate not in get_args(Speculate):
            ways = ", ".join((*get_args(Speculate), HF_LOOKUP_OPTION))
            raise TwigVLMError(f"speculate={self.speculate}: must be one of {ways}, or {HF_DRAFT}MODEL")
        else:
            SpeculationConfig(self.speculate, **self.drafting)  # type: ignore[arg-type]

    @property
    def assistant(self) -> str | None:
        """Id or directory of the small model that drafts for the base's own `generate`; None: no model does."""
        return self.speculate.removeprefix(HF_DRAFT) if self.speculate.startswith(HF_DRAFT) else None

    @property
    def assisted(self) -> bool:
        """Whether the base's own `generate` speculates."""
        return self.speculate == HF_LOOKUP_OPTION or self.assistant is not None

    @property
    def needs_twig(self) -> bool:
        """Whether a trained twig takes part."""
        return parse_method(self.method).needs_twig or not (self.assisted or self.speculate in WITHOUT_TWIG)

    @property
    def is_base(self) -> bool:
        """Whether the base's own `generate` answers."""
        return self.method == "none" and (self.assisted or self.speculate == "none")

    def check_batch(self, size: int) -> None:
        """Raise TwigVLMError if this many questions cannot be answered together."""
        if self.assisted and size > 1:
            raise TwigVLMError(
                f"speculate={self.speculate}: transformers drafts for one prompt at a time, not for {size}; give --batch_size 1"
            )

    def budget(self, visual: int) -> float | None:
        """R̄ for a prompt with `visual` visual tokens; None: it has no more than the budget, so that all of them stay."""
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
    """R̄ of each prompt, as measured."""
    seconds: float
    """Seconds from the inputs to the end of the last answer: vision, prompt and decoding of all prompts together."""
    first_token: float | None
    """Seconds until the first token; None where it is not known."""
    drafted: int
    accepted: int
    passes: int
    """Steps in which the base verified drafts, of all prompts; 0 where that is not known."""
    visual_again: list[int] | None = None
    """Visual tokens of each prompt that refocusing ran through the pruned layers again; None: the method does not refocus."""


@dataclass(frozen=True)
class Answerer:
    """A base with or without a twig that answers conversations in one setting.

    Args:
        base: the base.
        model: the base as a TwigVLM; None: the base's own `generate` answers.
        processor: the base's processor.
        setting: how to answer.
        pad: whether pictures are padded to squares with the processor's mean colour, as LLaVA-1.5's evaluation does.
        system: text of a message before each question; empty: none.
        frames: number of frames of a video; None: as the processor does.
        assistant: Hugging Face model that drafts, where the setting names one.
    """

    base: BaseVLM
    model: TwigVLM | None
    processor: Any
    setting: Setting
    pad: bool = False
    system: str = ""
    frames: int | None = None
    assistant: Any = None

    def __post_init__(self) -> None:
        if self.model is not None and self.setting.method != "none":
            parse_methods(self.model, [self.setting.method])  # for its errors

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int,
        sampling: Mapping[str, Any],
        draw: int = 0,
    ) -> list[Answered]:
        """Answer conversations, in one batch or, if their budgets or random draws differ, one by one.

        Args:
            conversations: each ends with a question.
            max_new_tokens: longest answer.
            sampling: `do_sample` and what belongs to it, as in `generate`.
            draw: number of the first question, so that a random choice differs between prompts of the same text.

        Raises:
            TwigVLMError: a picture or a text is refused, a prompt cannot have the budget, or transformers cannot draft for it.
        """
        self.setting.check_batch(len(conversations))
        prepared = [self._prepare(messages) for messages in conversations]
        video = any(True for messages in prepared for _ in media(messages, "video"))
        if video and getattr(self.processor, "video_processor", None) is None:
            raise TwigVLMError("video: this base takes none; choose one of 'twigvlm families' that does")
        sampled = video and self.frames is not None
        options = {"num_frames": self.frames, "do_sample_frames": True} if sampled else {}
        inputs = build_inputs(self.processor, prepared, self.base.device, self.base.dtype, **options)
        visual = [int(count) for count in self.base.visual_mask(inputs["input_ids"]).sum(dim=1)]
        budgets = {self.budget(count) for count in visual}
        random = parse_method(self.setting.method).is_random
        if len(budgets) > 1 or (random and len(conversations) > 1):
            parts = enumerate(conversations, draw)
            return [one for number, single in parts for one in self.answer([single], max_new_tokens, sampling, number)]
        (budget,) = budgets
        pruning = {} if budget is None else {"retain": budget, **self._pruning(draw)}
        return [self._generate(inputs, visual, {"max_new_tokens": max_new_tokens, **sampling, **pruning})]

    def budget(self, visual: int) -> float | None:
        """R̄ for a prompt with `visual` visual tokens; with FinalWipe at most the average when all are kept until K_f."""
        retain, method = self.setting.budget(visual), parse_method(self.setting.method)
        if retain is None or self.model is None or method.has_own_cuts:
            return retain
        layers, setting = self.base.num_layers, self.setting
        shape = layers, *self.model.twig.config.cut_layers(layers, setting.final_wipe, setting.final_share)
        return min(retain, average_kept(visual, visual, *shape))

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

    def _generate(self, inputs: dict[str, Any], visual: list[int], options: dict[str, Any]) -> Answered:
        clock = clock_of(self.base.device)
        # The base's own generate takes a streamer for a single prompt only.
        watch = FirstToken(clock) if self.model is None and len(visual) == 1 else None
        generate = self.base.model.generate if self.model is None else self.model.generate
        options, steps = {**options, **self._drafting(), "return_dict_in_generate": True}, None
        with ExitStack() as around:
            if self.setting.assisted:
                assert watch is not None, "it is a single prompt"
                steps, name = AssistedSteps(watch), f"speculate={self.setting.speculate}"
                options |= around.enter_context(assisted_generation(self.base, inputs, self.assistant, steps, name))
            began = clock()
            output: Any = generate(**inputs, **options, streamer=steps or watch)
            seconds = clock() - began
        first = None if watch is None or watch.at is None else watch.at - began
        new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        new = up_to_end(new, self.base.model.generation_config)
        averages, looks = [float(count) for count in visual], None
        drafted, accepted = ([], []) if steps is None else ([each] for each in steps.counts())
        if self.model is not None:
            first, averages = output.timings.prefill, output.average_visual
            drafted, accepted, looks = output.drafted_lengths, output.accepted_lengths, output.looks
        return Answered(
            [self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new],
            [len(ids) for ids in new],
            [int(count) for count in inputs["attention_mask"].sum(dim=1)],
            visual,
            list(averages),
            seconds,
            first,
            sum(map(sum, drafted)),
            sum(map(sum, accepted)),
            sum(count > 0 for row in drafted for count in row),
            None if looks is None else [sum(look.ran for look in row) for row in looks],
        )

    def _drafting(self) -> dict[str, Any]:
        """Options of `generate`."""
        setting = self.setting
        if self.model is None:
            if setting.speculate != HF_LOOKUP_OPTION:
                return {}
            lookup = SpeculationConfig("lookup", **setting.drafting)  # type: ignore[arg-type]
            return prompt_lookup(lookup.draft_length, lookup.lookup_ngram)
        return {"speculate": setting.speculate, **setting.drafting}

    def _pruning(self, draw: int) -> dict[str, Any]:
        """Options of `generate`, beside the budget."""
        assert self.model is not None, "the base's own generate prunes nothing"
        setting, method = self.setting, parse_method(self.setting.method)
        return method.options(self.model, setting.final_wipe, setting.final_share, setting.seed + draw)


def to_square(image: Image.Image, colour: Sequence[int]) -> Image.Image:
    """A picture centred in the smallest square that holds it, with the given RGB colour around it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(colour))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
