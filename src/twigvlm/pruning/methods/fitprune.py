"""FitPrune: a cut after every layer, by a schedule that is calibrated on a few prompts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twigvlm.base.vlm import BaseVLM
from twigvlm.errors import TwigVLMError
from twigvlm.files import replacing, writing
from twigvlm.pruning.cut import Cut, Need, solve_cuts
from twigvlm.pruning.question import attention_from, question_mask
from twigvlm.pruning.select import top_visual
from twigvlm.pruning.view import CutView, Tokens

SCHEDULE = "fitprune.json"


@dataclass(frozen=True)
class FitPrune:
    """After each layer the visual tokens stay that visual tokens and the question attend to most: the product of both.

    Ye et al., "Fit and Prune", AAAI 2025; attention is the maximum over heads. The authors prune inside a layer, between
    attention and feed-forward network; here tokens go after the layer.
    """

    kept: tuple[float, ...]
    """Share of M that goes on after layers 1..L−1, from `calibrated`; scaled to other budgets."""
    paper: ClassVar[str] = "Ye et al., AAAI 2025, arXiv:2409.10197"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LAST_LAYER})

    def __post_init__(self) -> None:
        falling = list(self.kept) == sorted(self.kept, reverse=True)
        if not self.kept or not falling or not all(0 < share <= 1 for share in self.kept):
            raise TwigVLMError("kept: must be shares of more than 0 and at most 1 that never grow; calibrate them")

    @classmethod
    @torch.no_grad()
    def calibrated(cls, base: BaseVLM, prompts: Iterable[dict[str, Any]], share: float) -> "FitPrune":
        """The schedule under which both distributions of attention lose as little as possible in every layer.

        Each layer drops the tokens that are in the tails, each of mass α, of both distributions; α follows from the budget.

        Args:
            base: the base, `TwigVLM.base`.
            prompts: the processor's outputs for single prompts; a few dozen are enough.
            share: R̄/M.

        Raises:
            TwigVLMError: no prompt has visual tokens, or the share is not more than 1/L and at most 1.
        """
        if not 1 / base.num_layers < share <= 1:
            raise TwigVLMError(f"share={share:g}: must be more than 1/{base.num_layers}, and at most 1")
        measured = [_by_layer(base, inputs) for inputs in prompts]
        measured = [each for each in measured if each.shape[-1]]
        if not measured:
            raise TwigVLMError("prompts: none of them has visual tokens; give some with images")
        below, above = 0.0, 1.0
        for _ in range(30):
            alpha = (below + above) / 2
            kept = _left(measured, alpha)
            average = float(1 + kept.sum()) / base.num_layers
            below, above = (alpha, above) if average > share else (below, alpha)
        return cls(tuple(_left(measured, below).tolist()))

    @classmethod
    def load(cls, folder: str) -> "FitPrune":
        """The schedule in a directory that `twigvlm train fitprune` has written to.

        Raises:
            TwigVLMError: there is none, or the file is broken.
        """
        path = Path(folder) / SCHEDULE
        try:
            return cls(tuple(float(share) for share in json.loads(path.read_text(encoding="utf-8"))["kept"]))
        except FileNotFoundError:
            raise TwigVLMError(
                f"schedule {folder!r}: {SCHEDULE} is not there; make one with 'twigvlm train fitprune'"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TwigVLMError(f"{path}: not a schedule ({error!r}); make it again") from None

    def save_pretrained(self, folder: Path) -> None:
        """Write the schedule to a directory, for `pruner="fitprune:DIRECTORY"`. Raises TwigVLMError if that is impossible."""
        with writing(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SCHEDULE) as temporary:
            temporary.write_text(json.dumps({"kept": self.kept}), encoding="utf-8")

    def check(self, layers: int) -> None:
        """Raise TwigVLMError unless the schedule is for a base of that many layers."""
        if len(self.kept) != layers - 1:
            raise TwigVLMError(f"kept: has {len(self.kept)} shares, but this base needs {layers - 1}; calibrate on it")

    def cuts(self, retain: float | None, visual: int, layers: int) -> tuple[Cut, ...]:
        """The calibrated schedule, scaled. Raises TwigVLMError if it is another base's, or no scale has this average."""
        self.check(layers)
        return solve_cuts(
            range(1, layers), lambda scale: [scale * each / self.kept[-1] for each in self.kept], retain, visual, layers
        )

    def choose(self, view: CutView, keep: Sequence[int]) -> Bool[Tensor, "batch tokens"]:
        """The visual tokens with the largest products of both kinds of attention."""
        of_visual, of_question = attention_received(view)
        return top_visual(of_visual * of_question, view.tokens.visual, keep)


def attention_received(view: CutView) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch tokens"]]:
    """Attention, maximum over heads, that each visual token gets from visual tokens (mean) and from the question (sum).

    Args:
        view: at the cut.

    Returns:
        Both in float32, 0 at text tokens.
    """
    received = []
    for asking in (view.prompt.visual_mask, question_mask(view.prompt)):
        total = torch.zeros(view.tokens.visual.shape, device=asking.device)
        for shares, asks, _ in attention_from(view, asking):
            total += (shares.amax(dim=1) * asks[..., None]).sum(dim=1)
        received.append(total * view.tokens.visual)
    return received[0] / view.tokens.visual.sum(dim=1, keepdim=True).clamp(min=1), received[1]


def _by_layer(base: BaseVLM, inputs: dict[str, Any]) -> Float[Tensor, "layers 2 visual"]:
    """Both distributions of a prompt after layers 1..L−1, without pruning."""
    prompt = base.prompt(**inputs)
    tokens = Tokens(prompt.hidden, base.token_inputs(prompt), prompt.visual_mask, prompt.lengths)
    found = []
    for layer in range(1, base.num_layers):
        tokens = tokens.through(base, layer - 1, layer, base.masks(), None, keep_last_input=True)
        received = attention_received(CutView(base, prompt, layer, tokens, None))
        found.append(torch.stack([each[0, prompt.visual_mask[0]] for each in received]))
    return torch.stack(found)


def _left(measured: Sequence[Float[Tensor, "layers 2 visual"]], alpha: float) -> Float[Tensor, " layers"]:
    """Share of the visual tokens that is left after each layer; a token that went stays away. At least one of 1,000 is left."""
    shares = []
    for received in measured:
        order = received.argsort(dim=-1)
        mass = received.gather(-1, order).cumsum(dim=-1)
        in_tail = torch.zeros_like(received).scatter(-1, order, (mass <= alpha * mass[..., -1:]).to(received))
        shares.append(1 - in_tail.prod(dim=1).mean(dim=-1))
    return torch.stack(shares).mean(dim=0).cummin(dim=0).values.clamp(min=0.001)
