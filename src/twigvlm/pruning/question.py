"""The question of a prompt and the attention from it, which methods that cut between layers rank by."""

from collections.abc import Iterator

from jaxtyping import Bool
from torch import Tensor

from twigvlm.base.layers import project_keys
from twigvlm.base.packing import valid_mask
from twigvlm.base.prompt import Prompt
from twigvlm.pruning.attention_rows import AttentionRows, attention_rows
from twigvlm.pruning.view import CutView, last_mask


def question_mask(prompt: Prompt) -> Bool[Tensor, "batch tokens"]:
    """True at the text after the last visual token of each prompt, and always at its last token."""
    visual, device = prompt.visual_mask, prompt.hidden.device
    behind = visual.flip(1).cumsum(dim=1).flip(1) == 0
    count = visual.shape[1]
    return (behind & valid_mask(prompt.lengths, count, device)) | last_mask(prompt.lengths, count, device)


def attention_from(view: CutView, asking: Bool[Tensor, "batch prompt_tokens"]) -> Iterator[AttentionRows]:
    """Attention from some tokens of the prompts, in the layer before a cut; see `attention_rows`.

    Args:
        view: at the cut; the method must have `Need.LAST_LAYER`.
        asking: True at those tokens, in the whole prompts; tokens that were cut do not ask.
    """
    layer, inputs = view.base.layers[view.layer - 1], view.tokens.inputs
    keys = project_keys(layer, view.before, inputs)
    return attention_rows(layer, view.before, keys, inputs, view.remaining(asking))
