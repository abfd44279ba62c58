"""`twigvlm inspect`: show what the twig attends to and what it drafts, as a picture and a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twigvlm.cli.options import QuestionOptions
from twigvlm.errors import TwigVLMError

if TYPE_CHECKING:
    from torch import Tensor

    from twigvlm.cli.answer import Answer
    from twigvlm.cli.session import Session
    from twigvlm.model import TwigVLM

PICTURE, PAGE = "patches.png", "answer.html"
TWIG_RANKING = "twig"
"""The ranking by which the twig prunes, as a `Variant.method`."""

_DEPTH = 0.6  # of the base: where the deep layer lies unless one is chosen


@dataclass(frozen=True)
class Inspect(QuestionOptions):
    """Show which patches a twig keeps and which tokens of an answer it drafts."""

    prompt: str = "Describe this image in detail."
    """Question about the image."""
    budgets: tuple[float, ...] = (192, 128, 64)
    """Budgets R̄ for which the kept patches are shown."""
    deep_layer: int | None = None
    """Base layer, counted from 1, whose attention is shown next to the twig's. None: the layer at 60 % of the depth."""
    out: Path = Path("twigvlm-inspect")
    """Directory in which to write patches.png and answer.html."""

    def run(self) -> None:
        """Ask once, and write the picture and the page to the directory."""
        from twigvlm.cli.answer import answer_question, check_request
        from twigvlm.cli.inspect_page import answer_page
        from twigvlm.cli.output import busy, check_directory, steps
        from twigvlm.cli.session import SessionConfig, default_picture, open_session
        from twigvlm.config import PruningConfig
        from twigvlm.evaluation.figures import draw_patches, figure_class
        from twigvlm.evaluation.variants import score_all
        from twigvlm.images import load_image
        from twigvlm.inputs import build_inputs, user_turn
        from twigvlm.visualize import patch_grid, seen_box

        config = SessionConfig.resolve(self.model, self.twig, PruningConfig(self.retain), self.speculate)
        if config.twig is None:
            raise TwigVLMError(
                f"retain={self.retain} with speculate={self.speculate}: no twig to inspect; add --retain 64 or --speculate chain"
            )
        if not self.budgets:
            raise TwigVLMError("budgets: none given; give at least one, for example --budgets 64")
        check_request(self.prompt, self.max_new_tokens)
        check_directory(self.out)
        figure_class()
        image = load_image(self.image or default_picture())
        session = open_session(config, self.dtype, self.device)
        model = session.model
        assert model is not None
        titles = rankings(model, self.deep_layer)
        question = user_turn(self.prompt, image)
        inputs = build_inputs(session.processor, [[question]], session.base.device, session.base.dtype)
        mask = model.base.visual_mask(inputs["input_ids"])
        visual = int(mask.sum())
        grid = patch_grid(session.base, visual, inputs)
        if grid is None:
            raise TwigVLMError(
                f"model {self.model!r}: its {visual} visual tokens form no grid to draw; choose a picture that becomes no tiles"
            )
        keeps = {budget: _keep(model, budget, visual) for budget in self.budgets}
        with steps("Answering", self.max_new_tokens, last_line=False) as advance:
            answer = answer_question(
                session, question, self.max_new_tokens, accelerated=True, on_token=lambda: advance()
            )
        with busy("Ranking the patches"):
            scores = {method: row[mask] for method, row in score_all(model, inputs, list(titles)).items()}
        picture = draw_patches(
            image,
            {title: scores[method].view(grid) for method, title in titles.items()},
            {
                f"kept at R̄ = {budget:g} (R = {keep})": _best(scores[TWIG_RANKING], keep)
                for budget, keep in keeps.items()
            },
            seen_box(session.processor, image),
        )
        tokenizer = session.processor.tokenizer
        page = answer_page(self.prompt, answer, tokenizer.decode, picture, _settings(self, session, answer))
        self._write(picture, page)

    def _write(self, picture: bytes, page: str) -> None:
        """Write both files, each completely or not at all, and print their paths."""
        from twigvlm.files import replacing

        self.out.mkdir(parents=True, exist_ok=True)
        for name, data in ((PICTURE, picture), (PAGE, page.encode())):
            with replacing(self.out / name) as temporary:
                temporary.write_bytes(data)
        print(f"Patches: {self.out / PICTURE}")
        print(f"Answer: {self.out / PAGE}")


def rankings(model: TwigVLM, deep_layer: int | None) -> dict[str, str]:
    """The rankings to draw: `Variant.method` -> title of the map."""
    trunk, layers = model.twig.config.trunk_layers, model.base.num_layers
    if deep_layer is not None and not 1 <= deep_layer <= layers:
        raise TwigVLMError(f"deep_layer={deep_layer}: must be 1 to {layers}, the layers of this base")
    deep = round(_DEPTH * layers) if deep_layer is None else deep_layer
    attention = "attention of the last twig layer"
    found = (
        {TWIG_RANKING: attention}
        if model.twig.pruning_head is None
        else {TWIG_RANKING: "P-Head", "attention": attention}
    )
    if trunk:
        found[f"deep:{trunk}"] = f"attention of base layer {trunk} (K)"
    return {**found, f"deep:{deep}": f"attention of base layer {deep} of {layers}"}


def _keep(model: TwigVLM, budget: float, visual: int) -> int:
    from twigvlm.pruning.budget import solve_keep

    layers = model.base.num_layers
    return solve_keep(budget, visual, layers, *model.twig.config.cut_layers(layers))


def _best(scores: Tensor, keep: int) -> list[int]:
    from twigvlm.pruning.select import top_visual

    return top_visual(scores[None], scores.new_ones((1, len(scores))).bool(), [keep])[0].nonzero()[:, 0].tolist()


def _settings(options: Inspect, session: Session, answer: Answer) -> dict[str, Any]:
    """The settings that the answer depends on, for the page."""
    import torch
    import transformers

    from twigvlm.images import short_name

    assert session.model is not None
    config = session.model.twig.config
    return {
        **session.settings(),
        "image": short_name(options.image) if options.image else "the scene that ships with the package",
        "attention": session.model.base.attention,
        "trunk layers K, twig layers T": f"{config.trunk_layers}, {config.twig_layers}",
        "FinalWipe K_f": "off" if config.final_wipe is None else config.final_wipe,
        "share φ kept after it": f"{config.final_share:g}",
        "budget R̄": "no pruning" if options.retain is None else f"{options.retain:g}",
        "visual tokens kept": f"{answer.kept_tokens} of {answer.visual_tokens}",
        "speculate": options.speculate,
        "max new tokens": options.max_new_tokens,
        "torch, transformers": f"{torch.__version__}, {transformers.__version__}",
    }
