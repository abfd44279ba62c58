"""Scout mode in vLLM: of a picture, only the tokens that the twig ranks highest for the question enter the decoder.

It uses vLLM's own interfaces. The placeholder of a picture is as long as the number of kept tokens. The question comes with
the request (`mm_processor_kwargs`), and so enters the picture's hash, by which vLLM caches embeddings and prefixes. Kept tokens
need the positions of the whole prompt, which vLLM's M-RoPE interface provides: first all tokens of a picture get its first
position, and the text after it the positions that it has in the whole prompt. The offset of each kept token is known only after
the ranking. It is appended to the token's features, and added to its position when it enters the decoder or the drafter.

This module has the parts that all bases share, to be mixed into vLLM's classes of a base (`scout_llava.py`, `scout_qwen.py`).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement

from twigvlm.inputs import special_tokens
from twigvlm.integrations.vllm.arithmetic import moved_by, position_buffer, with_offsets, without_offsets
from twigvlm.integrations.vllm.budget import OPTIONS, PATCHES, check_question, is_diverse, kept_tokens, parts
from twigvlm.integrations.vllm.layout import check_scout, check_scouting
from twigvlm.integrations.vllm.ranking import Ranking
from twigvlm.pruning.select import Select, best, diverse

# The classes below stand before vLLM's own of a base, whose methods they call.
if TYPE_CHECKING:
    from typing import Any as Base
else:
    Base = object


class ScoutInfo(Base):
    """Gives vLLM the base's processor, without the options of scout mode, which it does not know."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """The base's own processor."""
        return super().get_hf_processor(**_others(kwargs))


class ScoutProcessor(Base):
    """Makes placeholders of R tokens for each picture, and passes the question on with the pixels. Videos are not pruned."""

    def _visual(self, mm_items: Any, data: Mapping[str, Any], item: int) -> int:
        """M, number of visual tokens of a picture; `data` is the output of the base's own processor."""
        raise NotImplementedError

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, _others(hf_kwargs))
        pictures = mm_items.get_all_counts().get("image", 0)
        if pictures:
            settings, token = self.info.get_hf_config().twig_scout, image_token(self.info.get_hf_config())
            ids, limit = self._question(hf_kwargs), self.info.ctx.model_config.max_model_len
            check_question(ids, token, limit)
            sizes = [self._visual(mm_items, data, item) for item in range(pictures)]
            data["scout_ids"] = torch.tensor([ids] * pictures)
            data["scout_diverse"] = torch.tensor([is_diverse(settings, hf_kwargs)] * pictures)
            data["scout_keep"] = torch.tensor([kept_tokens(settings, hf_kwargs, visual) for visual in sizes])
        return data

    def _question(self, options: Mapping[str, object]) -> list[int]:
        settings = self.info.get_hf_config().twig_scout
        question = str(options.get("question") or settings["question"])
        text = settings["prompt"].replace("{question}", question)
        tokenizer = self.info.get_tokenizer()
        return list(tokenizer(text, **special_tokens(text, tokenizer)).input_ids)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, _others(hf_processor_mm_kwargs))
        batched = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {**fields, "scout_ids": batched, "scout_keep": batched, "scout_diverse": batched}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        token = image_token(self.info.get_hf_config())

        def replacement(item: int) -> list[int]:
            return [token] * int(out_mm_kwargs["image"][item]["scout_keep"].data)

        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        others = [update for update in updates if update.modality != "image"]
        return [PromptReplacement(modality="image", target=[token], replacement=replacement), *others]


class Scout(Base):
    """A base whose decoder gets only the kept visual tokens of pictures."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_scout(vllm_config)
        model = vllm_config.model_config
        check_scouting(model.hf_config.twig_scout, model.hf_text_config, vllm_config.parallel_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings: dict[str, Any] = self.config.twig_scout
        self._dtype = model.dtype
        # At one address for as long as the model lives, because CUDA graphs read it there.
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.offsets = torch.zeros(3, tokens, dtype=torch.long)
        self.positions = position_buffer(tokens)

    @cached_property
    def ranking(self) -> Ranking:
        """Trunk and twig, which are not part of the checkpoint that vLLM loads. They are loaded on first use, because some of
        vLLM's loaders do not call `load_weights`."""
        return Ranking(self.settings["path"], self._dtype, next(self.language_model.parameters()).device)

    def _offsets_in_pictures(self, kwargs: Mapping[str, Any], pictures: int) -> list[Tensor]:
        """For each picture, the distance of each visual token from the picture's first position on each axis, [M, axes]."""
        raise NotImplementedError

    def _patches(self, kwargs: Mapping[str, Any], pictures: int) -> list[int]:
        """Number of patches of each picture in the vision tower."""
        raise NotImplementedError

    def _part(self, kwargs: Mapping[str, Any], first: int, end: int) -> dict[str, Any]:
        """Inputs of the vision tower for the pictures from `first` to before `end`."""
        raise NotImplementedError

    def load_weights(self, weights: Any) -> Any:
        """Load the base's weights from its own files, and trunk and twig from the export."""
        loaded = super().load_weights(weights)
        device = next(self.language_model.parameters()).device
        self.offsets, self.positions = self.offsets.to(device), self.positions.to(device)
        _ = self.ranking  # now, so that vLLM counts its memory
        return loaded

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Features of the kept tokens of each picture with their offsets, [R, width + 2 × axes]; all tokens of a video."""
        if "scout_ids" not in kwargs:
            videos: Any = super().embed_multimodal(**kwargs)
            return [with_offsets(video, video.new_zeros(len(video), 3, dtype=torch.long)) for video in videos]
        questions: Any = kwargs.pop("scout_ids")
        keeps: Any = kwargs.pop("scout_keep")
        differ: Any = kwargs.pop("scout_diverse")
        rows = list(zip(questions, keeps, differ, self._offsets_in_pictures(kwargs, len(keeps)), strict=True))
        scouted: list[Tensor] = []
        # vLLM lets in as many pictures as their kept tokens have room, but the tower sees all of their patches.
        for first, end in parts(self._patches(kwargs, len(keeps)), PATCHES):
            pictures: Any = super().embed_multimodal(**self._part(kwargs, first, end))
            for features, (ids, keep, other, offsets) in zip(pictures, rows[first:end], strict=True):
                select = diverse if bool(other) else best
                scouted.append(self._scouted(features, ids.view(-1), int(keep), select, offsets))
        return scouted

    def _scouted(self, features: Tensor, ids: Tensor, keep: int, select: Select, offsets: Tensor) -> Tensor:
        token, device = image_token(self.config), features.device
        if keep == len(features):  # whatever the ranking says
            return with_offsets(features, offsets.to(device))
        # `ids` and `offsets` are on the CPU, so that the GPU need not be waited for.
        at = int((ids == token).nonzero()[0])
        embedded = self.language_model.embed_input_ids(ids.masked_fill(ids == token, 0).to(device))
        embedded = torch.cat((embedded[:at], features.to(embedded.dtype), embedded[at + 1 :]))
        visual = torch.zeros(len(embedded), dtype=torch.bool)
        visual[at : at + len(features)] = True
        text = torch.arange(len(ids)).expand(offsets.shape[1], -1)
        behind = text[:, at + 1 :] + int(offsets.max())
        positions = torch.cat((text[:, :at], at + offsets.T, behind), dim=1)
        kept = self.ranking(embedded, visual.to(device), positions.to(device), keep, select)
        return with_offsets(features[kept], offsets.to(device)[kept])

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """As the base's; the offsets of visual tokens are stored for `forward`."""
        self.offsets.zero_()
        if not multimodal_embeddings or is_multimodal is None:
            return super().embed_input_ids(input_ids)
        placed = [without_offsets(part, self.config.get_text_config().hidden_size) for part in multimodal_embeddings]
        offsets = torch.cat([offset for _, offset in placed]).to(self.offsets.device)
        self.offsets[:, : len(input_ids)][:, is_multimodal.to(self.offsets.device)] = offsets.T
        return super().embed_input_ids(input_ids, [part for part, _ in placed], is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """The base's forward pass, with every token at the position that it has in the whole prompt."""
        # vLLM bounds how many tokens a sequence has, not their positions: beyond the last one there are no rotary embeddings.
        last = self.config.get_text_config().max_position_embeddings - 1
        moved = moved_by(positions, self.offsets, last, self.positions)
        return super().forward(input_ids, moved, intermediate_tensors, inputs_embeds, **kwargs)


def image_token(config: Any) -> int:
    """Token id of the placeholder of pictures, which configs have under one of two names."""
    found = getattr(config, "image_token_id", None)
    return int(config.image_token_index if found is None else found)


def _others(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name not in OPTIONS}
