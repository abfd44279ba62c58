"""Relevance of visual tokens to a question by CLIP's two towers, as CDPruner's authors measure it."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twigvlm.errors import TwigVLMError
from twigvlm.pruning.images import ImageTokens
from twigvlm.pruning.select import unit


@dataclass(frozen=True)
class ClipRelevance:
    """Minus the mean cosine of each visual token and the segments of the question, in the space that CLIP's towers share.

    Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity", NeurIPS 2025, for
    `CDPruner(relevance=...)`. A visual token is its feature before the base's projector after CLIP's last norm and visual
    projection; like the authors' code this negates the cosines. The question is the text after the last image, without
    special tokens but with what the chat template puts there. Its CLIP tokens are cut into segments of CLIP's context, the last
    one filled up with token 0.
    """

    clip: Any
    """`CLIPModel` of transformers, with the vision tower that the base has: for LLaVA-1.5 openai/clip-vit-large-patch14-336."""
    clip_tokenizer: Any
    """Tokenizer of that model."""
    base_tokenizer: Any
    """Tokenizer of the base, `processor.tokenizer`: it turns a prompt's ids back into text."""
    ending: str = ""
    """What the chat template puts after a question, for example " ASSISTANT:"; it is left out."""

    @torch.no_grad()
    def __call__(self, image: ImageTokens) -> Float[Tensor, " tokens"]:
        """Relevance of the tokens of one image.

        Raises:
            TwigVLMError: this CLIP has vision features of another width than the base, or the base merges patches.
        """
        clip, features = self.clip, image.features
        weight, width = clip.visual_projection.weight, clip.config.vision_config.hidden_size
        if image.vision.projector is None or features.shape[1] != width:
            raise TwigVLMError(
                f"relevance: this CLIP has {width} values for a patch, but the base's vision features are others; choose the "
                "CLIP whose vision tower the base has, or leave relevance out"
            )
        patches = clip.visual_projection(clip.vision_model.post_layernorm(features.to(weight)))
        question = self.segments(image.question_ids).to(weight.device)
        texts = clip.text_projection(clip.text_model(input_ids=question).pooler_output)
        return -(unit(patches) @ unit(texts).T).mean(dim=1).to(features.device)

    def segments(self, question_ids: Int[Tensor, " text"]) -> Int[Tensor, "segments context"]:
        """CLIP's token ids of a question, in segments as long as CLIP's context.

        Args:
            question_ids: the base's token ids of the question.
        """
        text = (
            self.base_tokenizer.decode(question_ids, skip_special_tokens=True).strip().removesuffix(self.ending.strip())
        )
        ids = torch.tensor(self.clip_tokenizer(text.strip())["input_ids"])
        context = self.clip.config.text_config.max_position_embeddings
        return torch.nn.functional.pad(ids, (0, -len(ids) % context)).view(-1, context)
