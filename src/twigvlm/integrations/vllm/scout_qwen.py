"""Scout mode for Qwen2-VL and Qwen2.5-VL: pictures of any size, positions on three axes (time, row, column)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from twigvlm.integrations.vllm.budget import positions_around
from twigvlm.integrations.vllm.scout import Scout, ScoutInfo, ScoutProcessor


class _Processor(ScoutProcessor):
    def _visual(self, mm_items: Any, data: Mapping[str, Any], item: int) -> int:
        return len(_grid(data["image_grid_thw"][item], self.info.get_hf_config()))


class _Scout(Scout):
    def _offsets_in_pictures(self, kwargs: Mapping[str, Any], pictures: int) -> list[Tensor]:
        return [_grid(size, self.config) for size in kwargs["image_grid_thw"]]

    def _patches(self, kwargs: Mapping[str, Any], pictures: int) -> list[int]:
        return [int(patches) for patches in kwargs["image_grid_thw"].prod(-1)]

    def _part(self, kwargs: Mapping[str, Any], first: int, end: int) -> dict[str, Any]:
        sizes = self._patches(kwargs, end)
        start, stop = sum(sizes[:first]), sum(sizes[:end])
        merged = self.config.vision_config.spatial_merge_size**2
        rows = {
            name: kwargs[name][start // patches : stop // patches]
            for name, patches in (("pixel_values", 1), ("image_embeds", merged))
            if name in kwargs
        }
        return {**rows, "image_grid_thw": kwargs["image_grid_thw"][first:end]}

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions [3, tokens] in the whole prompt, where all tokens of a picture have its first position; and by how much the
        position of a later token exceeds its index."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        items = []
        for feature, (start, *sizes, pace) in zip(features, self.iter_mm_grid_thw(features), strict=True):
            offsets = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, 3).T
            offsets[0] = (offsets[0] * pace).long()
            extent = int(offsets.max()) + 1
            if feature.modality == "image":
                offsets = torch.zeros(3, feature.mm_position.length, dtype=torch.long)
            items.append((start, offsets, extent))
        return positions_around(len(input_tokens), items)


def _grid(size: Any, config: Any) -> Tensor:
    """Time, row and column of each visual token of a picture, [M, 3], from its numbers of patches on these axes."""
    merged, (frames, rows, columns) = config.vision_config.spatial_merge_size, torch.as_tensor(size).tolist()
    axes = (frames, rows // merged, columns // merged)
    return torch.cartesian_prod(*(torch.arange(axis) for axis in axes)).view(-1, 3)


class ScoutQwen2Info(ScoutInfo, Qwen2VLProcessingInfo):
    """Qwen2-VL's."""


class ScoutQwen2Processor(_Processor, Qwen2VLMultiModalProcessor):
    """Qwen2-VL's."""


@MULTIMODAL_REGISTRY.register_processor(
    ScoutQwen2Processor, info=ScoutQwen2Info, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class ScoutQwen2(_Scout, Qwen2VLForConditionalGeneration):
    """Qwen2-VL in scout mode."""


class ScoutQwen25Info(ScoutInfo, Qwen2_5_VLProcessingInfo):
    """Qwen2.5-VL's."""


class ScoutQwen25Processor(_Processor, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's."""


@MULTIMODAL_REGISTRY.register_processor(
    ScoutQwen25Processor, info=ScoutQwen25Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class ScoutQwen25(_Scout, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL in scout mode."""
