"""What differs between model families, as data. Nothing outside this file knows a family's name."""

from dataclasses import dataclass, replace
from typing import Any

from twigvlm.errors import TwigVLMError


@dataclass(frozen=True)
class Visual:
    """One kind of visual input."""

    kind: str
    """What a user calls it."""
    placeholder: str
    """Attribute of the config that names the id of its placeholder tokens."""
    pixels: tuple[str, ...]
    """Arguments of the model's forward that carry its pixels, the usual one first."""
    grid: str | None = None
    """Argument with the frames, rows and columns of patches of each image or video, where the family has one; the squares
    of `vision_config.spatial_merge_size` patches become a visual token each."""

    @property
    def article(self) -> str:
        """The indefinite article of the kind, in messages."""
        return "an" if self.kind[0] in "aeiou" else "a"


IMAGES = Visual("image", "image_token_id", ("pixel_values",))
VIDEOS = Visual("video", "video_token_id", ("pixel_values_videos",))
GRIDS = (replace(IMAGES, grid="image_grid_thw"), replace(VIDEOS, grid="video_grid_thw"))


@dataclass(frozen=True)
class Tower:
    """Where a family's pixels become visual tokens. Paths are dotted, from the model's top."""

    path: str = "model.vision_tower"
    """The vision tower; its blocks are in the first list of modules in it."""
    videos: str | None = None
    """The vision tower of videos; None: the same as that of images."""
    projector: str = "model.multi_modal_projector"
    """Makes visual tokens of the tower's features."""
    pools: bool = False
    """Whether the projector mixes features that do not follow each other: what the tower attends to is then not known
    of a visual token."""


@dataclass(frozen=True)
class Family:
    """Where a family keeps the parts that pruning and speculation need. Paths are dotted, from the model's top."""

    name: str
    """What its authors call it."""
    model_type: str
    """`config.model_type` of the top-level model."""
    decoder: str = "model.language_model"
    """The language model: called with the merged embeddings; owns `layers`, `norm` and `rotary_emb`."""
    head: str = "lm_head"
    """The language-model head."""
    visuals: tuple[Visual, ...] = (IMAGES,)
    """Its kinds of visual input."""
    tower: Tower = Tower()
    """Where its pixels become visual tokens."""
    notes: str = ""
    """What a user should know of it."""


@dataclass(frozen=True)
class LanguageModel:
    """A language model inside a family whose layers are known to run one by one as they do in their model."""

    model_type: str
    """`config.model_type` of the language model."""
    rotary_per_layer_type: bool = False
    """Whether each type of layer has rotary embeddings of its own."""
    notes: str = ""
    """What a user should know of it."""


_MERGES = Tower("model.visual", projector="model.visual.merger")
_POOLS = Tower(pools=True)
_SHUFFLES = Tower("model.vision_model", projector="model.connector", pools=True)
_FRAMES = "its processor makes images of a video's frames"
_WINDOW = "with sliding-window layers: no flash attention"

FAMILIES: tuple[Family, ...] = (
    Family("LLaVA-1.5, Pixtral", "llava"),
    Family("LLaVA-NeXT", "llava_next"),
    Family("LLaVA-NeXT-Video", "llava_next_video", visuals=(IMAGES, VIDEOS)),
    Family("LLaVA-OneVision", "llava_onevision", visuals=(IMAGES, VIDEOS)),
    Family(
        "Video-LLaVA",
        "video_llava",
        visuals=(Visual("image", "image_token_id", ("pixel_values_images", "pixel_values")), VIDEOS),
        tower=Tower("model.image_tower", "model.video_tower"),
    ),
    Family("Mistral 3", "mistral3", tower=_POOLS),
    Family("Idefics3", "idefics3", decoder="model.text_model", tower=_SHUFFLES),
    Family("SmolVLM", "smolvlm", decoder="model.text_model", tower=_SHUFFLES, notes=_FRAMES),
    Family("InternVL 3 and 3.5", "internvl", tower=_POOLS, notes=_FRAMES),
    Family("Qwen2-VL", "qwen2_vl", visuals=GRIDS, tower=_MERGES),
    Family("Qwen2.5-VL", "qwen2_5_vl", visuals=GRIDS, tower=_MERGES),
    Family("Qwen3-VL", "qwen3_vl", visuals=GRIDS, tower=_MERGES),
    Family("Gemma 3", "gemma3", tower=_POOLS),
)

LANGUAGE_MODELS: tuple[LanguageModel, ...] = (
    LanguageModel("llama"),
    LanguageModel("mistral", notes=_WINDOW),
    LanguageModel("qwen2", notes=_WINDOW),
    LanguageModel("qwen3", notes=_WINDOW),
    LanguageModel("qwen2_vl_text", notes=_WINDOW),
    LanguageModel("qwen2_5_vl_text", notes=_WINDOW),
    LanguageModel("qwen3_vl_text"),
    LanguageModel("gemma3_text", rotary_per_layer_type=True, notes=_WINDOW),
)


def family_of(model: Any) -> Family:
    """The family of a Hugging Face model.

    Raises:
        TwigVLMError: the model's type is in no entry of `FAMILIES`.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise TwigVLMError(
        f"model type {model_type!r} is not supported (supported: {known}): it needs an entry in "
        "twigvlm/base/families.py that says where its decoder, head and visual placeholder ids are"
    )


def language_model_of(config: Any) -> LanguageModel:
    """The language model inside a family, by its config.

    Raises:
        TwigVLMError: its type is in no entry of `LANGUAGE_MODELS`.
    """
    for language_model in LANGUAGE_MODELS:
        if language_model.model_type == config.model_type:
            return language_model
    known = ", ".join(language_model.model_type for language_model in LANGUAGE_MODELS)
    raise TwigVLMError(
        f"language model {config.model_type!r} is not supported (supported: {known}): it needs an entry in "
        "twigvlm/base/families.py and a tiny model in the tests that shows its layers run one by one"
    )
