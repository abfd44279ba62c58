"""What `twigvlm inspect` does: ask once, rank the patches in several ways, and write both down."""

from typing import Any

import torch
import transformers
from torch import Tensor

from twigvlm.cli.answer import Answer, ask, check_request
from twigvlm.cli.inspect import Inspect
from twigvlm.cli.output import busy, check_directory
from twigvlm.cli.page import answer_page
from twigvlm.cli.session import Plan, Session, build_inputs, default_picture, open_session, patch_grid, seen_box
from twigvlm.errors import TwigVLMError
from twigvlm.evaluation.figures import draw_patches, figure_class
from twigvlm.evaluation.variants import score_all
from twigvlm.files import replacing
from twigvlm.images import load_image, short_name
from twigvlm.model import TwigVLM
from twigvlm.pruning.budget import solve_keep
from twigvlm.pruning.select import top_visual

PICTURE, PAGE = "patches.png", "answer.html"
OWN = "twig"
"""The ranking that the twig prunes by, as `Variant.method` names it."""

_DEPTH = 0.6  # of the base: where the deep layer lies unless one is chosen


def run_inspection(options: Inspect) -> None:
    """Write the picture and the page to the directory that the options name."""
    plan = Plan.resolve(options.model, options.twig, options.retain, options.speculate)
    if not plan.accelerated:
        raise TwigVLMError("retain=None with speculate=none: no twig to inspect; add --retain 64 or --speculate chain")
    if not options.budgets:
        raise TwigVLMError("budgets: none given; give at least one, for example --budgets 64")
    check_request(options.prompt, options.max_new_tokens)
    check_directory(options.out)
    figure_class()
    image = load_image(options.image or default_picture())
    with busy(f"Loading {options.model}"):
        session = open_session(plan, options.dtype, options.device)
    model = session.model
    assert model is not None
    titles = rankings(model, options.deep_layer)
    inputs = build_inputs(session.base, session.processor, [image], [options.prompt])
    mask = model.base.visual_mask(inputs["input_ids"])
    visual = int(mask.sum())
    grid = patch_grid(session.base, visual)
    if grid is None:
        raise TwigVLMError(
            f"model {options.model!r}: its {visual} visual tokens form no square grid that could be drawn"
        )
    keeps = {budget: _keep(model, budget, visual) for budget in options.budgets}
    with busy("Asking"):
        answer = ask(session, image, options.prompt, options.max_new_tokens, accelerated=True)
        scores = {method: row[mask] for method, row in score_all(model, inputs, list(titles)).items()}
    picture = draw_patches(
        image,
        {title: scores[method].view(grid) for method, title in titles.items()},
        {f"kept at R̄ = {budget:g} (R = {keep})": _best(scores[OWN], keep) for budget, keep in keeps.items()},
        seen_box(session.processor, image),
    )
    tokenizer = session.processor.tokenizer
    page = answer_page(options.prompt, answer, tokenizer.decode, picture, settings(options, session, answer))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, data in ((PICTURE, picture), (PAGE, page.encode())):
        with replacing(options.out / name) as temporary:
            temporary.write_bytes(data)
    print(f"Patches: {options.out / PICTURE}")
    print(f"Answer: {options.out / PAGE}")


def rankings(model: TwigVLM, deep_layer: int | None) -> dict[str, str]:
    """The rankings that are drawn: titles by `Variant.method`. One entry more is one map more."""
    trunk, layers = model.twig.config.trunk_layers, model.base.num_layers
    deep = round(_DEPTH * layers) if deep_layer is None else deep_layer
    attention = "attention of the last twig layer"
    found = {OWN: attention} if model.twig.pruning_head is None else {OWN: "P-Head", "attention": attention}
    if trunk:
        found["fastv"] = f"attention of base layer {trunk} (K)"
    return {**found, f"deep:{deep}": f"attention of base layer {deep} of {layers}"}


def _keep(model: TwigVLM, budget: float, visual: int) -> int:
    layers, final_wipe = model.base.num_layers, model.twig.config.final_wipe
    return solve_keep(
        budget, visual, layers, model.twig.config.trunk_layers, layers if final_wipe is None else final_wipe
    )


def _best(scores: Tensor, keep: int) -> list[int]:
    return top_visual(scores[None], torch.ones_like(scores[None], dtype=torch.bool), [keep])[0].nonzero()[:, 0].tolist()


def settings(options: Inspect, session: Session, answer: Answer) -> dict[str, Any]:
    """What the answer depends on, for the page."""
    assert session.model is not None
    config = session.model.twig.config
    return {
        **session.report(),
        "image": short_name(options.image) if options.image else "the scene that ships with the package",
        "attention": session.model.base.attention,
        "trunk layers K, twig layers T": f"{config.trunk_layers}, {config.twig_layers}",
        "FinalWipe K_f": "off" if config.final_wipe is None else config.final_wipe,
        "budget R̄": "no pruning" if options.retain is None else f"{options.retain:g}",
        "visual tokens kept": f"{answer.kept_tokens} of {answer.visual_tokens}",
        "speculate": options.speculate,
        "max new tokens": options.max_new_tokens,
        "torch, transformers": f"{torch.__version__}, {transformers.__version__}",
    }
