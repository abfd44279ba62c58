"""Draw the diagrams of the documentation as SVG: `python -m recipes.docs.figures` writes them to docs/images.

The numbers of tokens in them are computed by the library, for a base of LLaVA-1.5-7B's size.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from twigvlm.pruning.budget import solve_keep
from twigvlm.pruning.cut import Cut
from twigvlm.pruning.methods import make_pruner

FOLDER = Path(__file__).parents[2] / "docs" / "images"
VISUAL, LAYERS, TRUNK, FINAL_WIPE = 576, 32, 2, 24
GREEN, BLUE, ORANGE, GREY, INK = "#2f8f5b", "#3f6fb5", "#e8862e", "#c9ced6", "#28303a"


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    """A box, by its top left corner and its size in pixels."""
    size = f'width="{width:g}" height="{height:g}"'
    return f'<rect x="{x:g}" y="{y:g}" {size} rx="3" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'


def text(x: float, y: float, words: str, size: int = 14, anchor: str = "start", fill: str = INK) -> str:
    """A line of text, by the point on its baseline that `anchor` names."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through points that ends in a tip."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    style = f'fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"{dashes}'
    return f'<polyline points="{path}" {style}/>'


def picture(width: int, height: int, title: str, shapes: Sequence[str]) -> str:
    """A whole SVG file on white, so that it can be read in a dark theme too."""
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>'
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif">'
    )
    body = [head, f"<title>{escape(title)}</title>", tip, rectangle(0, 0, width, height, "white"), *shapes, "</svg>"]
    return "\n".join(body) + "\n"


def counts(cuts: Sequence[Cut]) -> list[int]:
    """Visual tokens that enter each layer."""
    return [next((cut.keep for cut in reversed(cuts) if cut.layer <= layer), VISUAL) for layer in range(LAYERS)]


def bars(cuts: Sequence[Cut], left: float, bottom: float, width: float, height: float) -> list[str]:
    """One bar for each layer, as high as the number of visual tokens that enter it."""
    step, shapes = width / LAYERS, []
    for layer, count in enumerate(counts(cuts)):
        tall = max(height * count / VISUAL, 1.5)
        fill = GREY if count == 0 else GREEN if count == VISUAL else BLUE
        shapes.append(rectangle(left + layer * step + 1, bottom - tall, step - 2, tall, fill))
    return shapes


def layers_figure() -> str:
    """The twig on its base: where visual tokens leave, and what grows where."""
    keep = solve_keep(64, VISUAL, LAYERS, TRUNK, FINAL_WIPE)
    left, bottom, width = 30.0, 330.0, 704.0
    step = width / LAYERS
    twig_left, twig_top = left + 4 * step, 112.0
    shapes = [
        text(left, 32, "Visual tokens in the 32 decoder layers of the base, at an average of 64", 17),
        *bars((Cut(TRUNK, keep), Cut(FINAL_WIPE, 0)), left, bottom, width, 230),
        text(left, 352, f"trunk: layers 1–{TRUNK}", 13),
        text(left, 370, f"{VISUAL} tokens", 13),
        text(left + 7 * step, 352, f"layers {TRUNK + 1}–{FINAL_WIPE}: the {keep} best tokens", 13),
        text(left + 25 * step, 352, f"layers {FINAL_WIPE + 1}–{LAYERS}: none", 13),
        text(left + 25 * step, 370, "(FinalWipe)", 13),
        arrow((left + TRUNK * step, 135), (twig_left - 4, 135)),
    ]
    for number in range(3):
        shapes.append(rectangle(twig_left + number * 62, twig_top, 56, 46, "#fdeedd", ORANGE))
        shapes.append(text(twig_left + number * 62 + 28, twig_top + 28, f"G{number + 1}", 14, "middle"))
    end = twig_left + 3 * 62
    shapes += [
        text(twig_left, twig_top - 12, "the twig: the only part that is trained", 13, fill=ORANGE),
        arrow((end, 124), (end + 60, 124)),
        text(end + 68, 128, "D-Head: drafts the next tokens of the answer", 13),
        arrow((end, 146), (end + 60, 146)),
        text(end + 68, 150, "P-Head: scores of the visual tokens", 13),
        arrow((end + 90, 158), (end + 90, 226), (left + 8 * step, 226), (left + 8 * step, 300), dashed=True),
        text(end + 100, 206, "choose which tokens go on", 13),
    ]
    return picture(764, 390, "A twig on the first layers of a base", shapes)


def methods_figure() -> str:
    """Visual tokens by layer under several methods with one average."""
    retain, shapes = 128, [text(30, 32, "The same average, 128 of 576 visual tokens, in four methods", 17)]
    twig = (Cut(TRUNK, solve_keep(retain, VISUAL, LAYERS, TRUNK, FINAL_WIPE)), Cut(FINAL_WIPE, 0))
    schedules = {name: make_pruner(name).cuts(retain, VISUAL, LAYERS) for name in ("visionzip", "fastv", "pyramiddrop")}
    for number, (name, cuts) in enumerate({"twig": twig, **schedules}.items()):
        left, bottom = 30 + number % 2 * 366, 190 + number // 2 * 186
        steps = ", ".join(
            f"{cut.keep} after {cut.layer}" if cut.layer else f"{cut.keep} from the start" for cut in cuts
        )
        shapes += [*bars(cuts, left, bottom, 340, 120), text(left, bottom + 20, f"{name}: {steps}", 13)]
    return picture(764, 412, "Visual tokens by layer under several pruning methods", shapes)


def row_of_tokens(tokens: Sequence[tuple[str, str]], left: float, top: float) -> list[str]:
    """Words in boxes of the colours that are given with them."""
    shapes = []
    for word, fill in tokens:
        shapes += [
            rectangle(left, top, 72, 30, fill, INK),
            text(left + 36, top + 20, word, 13, "middle", "white" if fill in (GREEN, BLUE, ORANGE) else INK),
        ]
        left += 80
    return shapes


def step_figure() -> str:
    """One step of speculation: draft, verify, commit."""
    answer = [("The", "white"), ("sign", "white")]
    drafted = [("says", ORANGE), ("stop", ORANGE), ("in", ORANGE), ("red", ORANGE)]
    accepted = [("says", GREEN), ("stop", GREEN), ("in", GREEN), ("white", BLUE)]
    shapes = [
        text(30, 32, "One step: draft, verify, commit", 17),
        text(30, 70, "1. Trunk and twig draft a few tokens, one after another (orange).", 14),
        *row_of_tokens([*answer, *drafted], 50, 84),
        text(30, 150, "2. The rest of the base checks all of them in one pass.", 14),
        *row_of_tokens([*answer, ("says ✓", GREY), ("stop ✓", GREY), ("in ✓", GREY), ("red ✗", GREY)], 50, 164),
        text(
            30,
            230,
            "3. Tokens before the first disagreement stay (green); the base adds its own next one (blue).",
            14,
        ),
        *row_of_tokens([*answer, *accepted], 50, 244),
        text(
            30,
            306,
            "Four tokens for one pass through the deep layers, all as the base would have chosen them.",
            14,
        ),
    ]
    return picture(764, 326, "One step of self-speculative decoding", shapes)


FIGURES = {"layers.svg": layers_figure, "methods.svg": methods_figure, "step.svg": step_figure}
"""File name -> what draws it."""


def main() -> None:
    """Write all figures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
