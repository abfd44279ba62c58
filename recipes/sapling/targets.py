"""What a visual token should say: word embeddings of the language model, mixed by what the patch shows.

The language model learns to read these before it ever meets pixels, and the vision tower with its projector learns to
produce them, so both sides meet in a language that the language model already speaks.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from recipes.sapling.scenes import CHARACTERS, COLOURS, GRID, KINDS

PLACE, CLEAR_PLACE, FAINT, MARK = 0.4, 1.2, 0.3, 0.5
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


class VisualTargets(nn.Module):
    """Target embedding of every patch; the tables are buffers of shape (entries, width)."""

    def __init__(self, embeddings: Float[Tensor, "V D"], tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.norm = float(embeddings.norm(dim=-1).mean())

        def table(words: list[str]) -> Float[Tensor, "words D"]:
            means = [embeddings[tokenizer(word, add_special_tokens=False).input_ids].mean(0) for word in words]
            return self.norm * nn.functional.normalize(torch.stack(means).detach().float(), dim=-1)

        zero = torch.zeros(1, embeddings.shape[1])
        things = [f" {kind.name}" for kind in KINDS]
        self.register_buffer("kinds", table([" background", *things, " sign"]))
        self.register_buffer("characters", torch.cat([zero, table(list(CHARACTERS))]))
        self.register_buffer("colours", torch.cat([table([f" {colour}" for colour in COLOURS]), zero]))
        self.register_buffer("mark", table([" object"])[0])
        along = torch.linspace(0, 2, GRID)
        weights = (1 - (along[:, None] - torch.arange(3)).abs()).clamp(min=0)
        rows, columns = (weights @ table([f" {word}" for word in words]) for words in (ROWS, COLUMNS))
        self.register_buffer("places", PLACE * (rows[:, None] + columns[None]).flatten(0, 1))

    def forward(
        self,
        kind: Int[Tensor, "*patches"],
        centre: Float[Tensor, "*patches"],
        colour: Int[Tensor, "*patches"],
        character: Int[Tensor, "*patches"],
        place: Int[Tensor, "*patches"],
    ) -> Float[Tensor, "*patches D"]:
        """Labels as in `PatchLabels`; `place` is the row-major index of the patch in the whole picture."""
        telling = torch.where(character > 0, 1.0, centre)[..., None]
        centre = centre[..., None]
        return (
            (FAINT + (1 - FAINT) * centre) * self.kinds[kind]
            + MARK * centre * self.mark
            + FAINT * self.colours[colour]
            + self.characters[character]
            + (1 + (CLEAR_PLACE / PLACE - 1) * telling) * self.places[place]
        )
