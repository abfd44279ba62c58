"""Scout mode in vLLM: a picture's embeddings are the tokens that the twig ranks highest for the question, at their own positions.

vLLM's own interfaces carry it. The placeholder of a picture is as long as what is kept. The question comes with the request
(`mm_processor_kwargs`), and so into the picture's hash, by which vLLM caches embeddings and prefixes. Positions other than 0, 1,
2, … are those of M-RoPE: a picture's tokens all get its first one, and what stands behind it the ones that it has in the whole
prompt. Where each kept token belongs is known after the ranking only: that is written behind its features and added to its
position when it enters the decoder, as it is in the drafter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement

from twigvlm.integrations.vllm.arithmetic import with_places, without_places
from twigvlm.integrations.vllm.budget import OPTIONS, check_question, kept_tokens, positions_around
from twigvlm.integrations.vllm.ranking import Ranking
from twigvlm.pruning.select import Select, best, diverse


class ScoutInfo(LlavaProcessingInfo):
    """What vLLM asks about the processor, which does not get to see the options of scout mode."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """The base's own."""
        return super().get_hf_processor(**_others(kwargs))


class ScoutProcessor(LlavaMultiModalProcessor):
    """Placeholders as long as what is kept, and the question beside the pixels."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, _others(hf_kwargs))
        pictures = mm_items.get_all_counts().get("image", 0)
        if pictures:
            ids = self._question(hf_kwargs)
            config, limit = self.info.get_hf_config(), self.info.ctx.model_config.max_model_len
            for item in range(pictures):
                check_question(ids, config.image_token_index, self._visual(mm_items, item), limit)
            data["scout_ids"] = torch.tensor([ids] * pictures)
            differ = bool(hf_kwargs.get("diverse", self.info.get_hf_config().twig_scout["diverse"]))
            data["scout_diverse"] = torch.tensor([differ] * pictures)
            data["scout_keep"] = torch.tensor([self._kept(mm_items, hf_kwargs, item) for item in range(pictures)])
        return data

    def _question(self, options: Mapping[str, object]) -> list[int]:
        settings = self.info.get_hf_config().twig_scout
        question = str(options.get("question") or settings["question"])
        text = settings["prompt"].replace("{question}", question)
        return list(self.info.get_tokenizer()(text).input_ids)

    def _kept(self, mm_items: Any, options: Mapping[str, object], item: int) -> int:
        return kept_tokens(self.info.get_hf_config().twig_scout, options, self._visual(mm_items, item))

    def _visual(self, mm_items: Any, item: int) -> int:
        size = mm_items.get_items("image", ImageProcessorItems).get_image_size(item)
        return int(self.info.get_num_image_tokens(image_width=size.width, image_height=size.height))

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, _others(hf_processor_mm_kwargs))
        batched = MultiModalFieldConfig.batched("image")
        return {**fields, "scout_ids": batched, "scout_keep": batched, "scout_diverse": batched}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        token = self.info.get_hf_config().image_token_index

        def replacement(item: int) -> list[int]:
            return [token] * self._kept(mm_items, hf_processor_mm_kwargs, item)

        return [PromptReplacement(modality="image", target=[token], replacement=replacement)]


@MULTIMODAL_REGISTRY.register_processor(ScoutProcessor, info=ScoutInfo, dummy_inputs=LlavaDummyInputsBuilder)
class ScoutLlava(LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA whose decoder gets the kept visual tokens alone.

    vLLM hands out positions on three axes to a model that says that it has them (`mrope_section` in its config); the decoder,
    which has one, gets the first.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings: dict[str, Any] = self.config.twig_scout
        self._dtype = vllm_config.model_config.dtype
        vision = self.config.vision_config
        whole = self.config.vision_feature_select_strategy == "full"
        self.visual = (vision.image_size // vision.patch_size) ** 2 + whole
        # At one address for as long as the model lives, because CUDA graphs read it there.
        self.places = torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.long)

    def load_weights(self, weights: Any) -> Any:
        """The base's from its own files, trunk and twig from the export."""
        loaded = super().load_weights(weights)
        device = next(self.language_model.parameters()).device
        self.places = self.places.to(device)
        ranking = Ranking(self.settings["path"], self._dtype, device)
        object.__setattr__(self, "ranking", ranking)  # no part of the checkpoint that vLLM has loaded
        return loaded

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Of each picture the kept tokens and their places, [R, width + 2]."""
        questions: Any = kwargs.pop("scout_ids")
        keeps: Any = kwargs.pop("scout_keep")
        differ: Any = kwargs.pop("scout_diverse")
        pictures = super().embed_multimodal(**kwargs)
        rows = zip(pictures, questions, keeps, differ, strict=True)
        return [
            self._scouted(features, ids.view(-1), int(keep), diverse if bool(other) else best)
            for features, ids, keep, other in rows
        ]

    def _scouted(self, features: Tensor, ids: Tensor, keep: int, select: Select) -> Tensor:
        token = self.config.image_token_index
        at = int((ids == token).nonzero()[0])
        embedded = self.language_model.embed_input_ids(ids.masked_fill(ids == token, 0))
        embedded = torch.cat((embedded[:at], features.to(embedded.dtype), embedded[at + 1 :]))
        visual = torch.zeros(len(embedded), dtype=torch.bool, device=embedded.device)
        visual[at : at + len(features)] = True
        kept = self.ranking(embedded, visual, keep, select)
        return with_places(features[kept], kept[:, None])

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """As LLaVA's; the places of visual tokens are kept for `forward`."""
        self.places.zero_()
        if not multimodal_embeddings or is_multimodal is None:
            return super().embed_input_ids(input_ids)
        parts = [without_places(part, self.config.text_config.hidden_size) for part in multimodal_embeddings]
        places = torch.cat([place for _, place in parts])[:, 0]
        self.places[: len(input_ids)][is_multimodal.to(self.places.device)] = places.to(self.places.device)
        return super().embed_input_ids(input_ids, [part for part, _ in parts], is_multimodal=is_multimodal)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions [3, tokens] as in the whole prompt, of each picture's tokens its first one; and what a later token's position
        is more than its index."""
        places = [(feature.mm_position.offset, feature.mm_position.length) for feature in mm_features]
        return positions_around(len(input_tokens), places, self.visual)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """As LLaVA's, with every token at the position that it has in the whole prompt."""
        if positions.ndim == 2:
            positions = positions[0]
        positions = positions + self.places[: len(positions)]
        # vLLM bounds how many tokens a sequence has, not their positions: beyond the last one there are no rotary embeddings.
        positions = positions.clamp(max=self.config.text_config.max_position_embeddings - 1)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)


def _others(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name not in OPTIONS}
