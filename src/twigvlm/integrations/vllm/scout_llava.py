"""Scout mode for LLaVA-1.5-type bases: pictures of one size, positions on one axis."""

from collections.abc import Mapping
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
from vllm.multimodal.parse import ImageProcessorItems

from twigvlm.integrations.vllm.budget import positions_around
from twigvlm.integrations.vllm.scout import Scout, ScoutInfo, ScoutProcessor


class ScoutLlavaInfo(ScoutInfo, LlavaProcessingInfo):
    """`ScoutInfo` of LLaVA."""


class ScoutLlavaProcessor(ScoutProcessor, LlavaMultiModalProcessor):
    """`ScoutProcessor` of LLaVA."""

    def _visual(self, mm_items: Any, data: Mapping[str, Any], item: int) -> int:
        size = mm_items.get_items("image", ImageProcessorItems).get_image_size(item)
        return int(self.info.get_num_image_tokens(image_width=size.width, image_height=size.height))


@MULTIMODAL_REGISTRY.register_processor(ScoutLlavaProcessor, info=ScoutLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder)
class ScoutLlava(Scout, LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA in scout mode.

    vLLM passes positions on three axes to a model that declares them (`mrope_section` in its config); the decoder, which has one
    axis, gets the first.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision = self.config.vision_config
        whole = self.config.vision_feature_select_strategy == "full"
        self.visual = (vision.image_size // vision.patch_size) ** 2 + whole

    def _offsets_in_pictures(self, kwargs: Mapping[str, Any], pictures: int) -> list[Tensor]:
        return [torch.arange(self.visual)[:, None]] * pictures

    def _patches(self, kwargs: Mapping[str, Any], pictures: int) -> list[int]:
        return [self.visual] * pictures

    def _part(self, kwargs: Mapping[str, Any], first: int, end: int) -> dict[str, Any]:
        return {name: values[first:end] for name, values in kwargs.items()}

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions [3, tokens] in the whole prompt, where all tokens of a picture have its first position; and by how much the
        position of a later token exceeds its index."""
        spans = [feature.mm_position for feature in mm_features]
        pictures = [(span.offset, torch.zeros(3, span.length, dtype=torch.long), self.visual) for span in spans]
        return positions_around(len(input_tokens), pictures)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """LLaVA's forward pass, with every token at the position that it has in the whole prompt."""
        return super().forward(input_ids, positions[0] if positions.ndim == 2 else positions, *args, **kwargs)
